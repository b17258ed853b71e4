"""What is compiled at the start of a run."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from swim_fast.options import AttentionLoss
from swim_fast.training import warm_up


@pytest.fixture
def asked(monkeypatch):
    """What is asked to be compiled."""
    seen = []
    monkeypatch.setattr(warm_up, "compile_in_background", lambda device, **run: seen.append((device.type, run)))
    return seen


def start(device="cuda", bf16=True, attention="sdpa", **loss):
    text = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, attn_implementation=attention)
    args = SimpleNamespace(device=torch.device(device), bf16=bf16, fp16=False)
    model = SimpleNamespace(config=config, dtype=torch.float32)
    warm_up.start_warm_up(model, AttentionLoss(layers=[0, 1], **loss), args)


def test_a_run_on_a_gpu_compiles_what_it_will_launch(asked):
    start()
    ((device, run),) = asked
    assert device == "cuda"
    assert (run["num_heads"], run["num_key_heads"], run["head_dim"]) == (14, 2, 64)
    assert (run["dtype"], run["fused"], run["over"], run["num_layers"]) == (torch.bfloat16, True, "set", 2)
    assert run["prediction"] == "probability" and run["with_masks"] and not run["with_sets"]


def test_choices_of_the_run_are_followed(asked):
    start(bf16=False, attention="eager", softmax="causal", prediction="min_max", criterion="dice")
    run = asked[0][1]
    assert (run["dtype"], run["fused"], run["over"]) == (torch.float32, False, "range")
    assert run["prediction"] == "min_max" and not run["with_masks"]
    start(softmax="causal", prediction="released")
    assert asked[1][1]["prediction"] is None and not asked[1][1]["with_masks"]
    start(system_weight=0.15)
    assert asked[2][1]["with_sets"]


def test_nothing_is_compiled_without_a_gpu_or_with_another_backend(asked):
    start(device="cpu")
    start(backend="torch")
    assert asked == []
