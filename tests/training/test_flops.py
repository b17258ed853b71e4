"""Operations of a step: by hand for the tiny model, and against torch's own counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from swim_fast.data.batch.counts import BatchCounts
from swim_fast.modeling.freezing import freeze
from swim_fast.training import flops
from swim_fast.training.flops import StepFlops, get_peak_flops


def batch_of(model, frames=2, height=6, width=20, text=30, labels=12) -> dict:
    """One video of `frames` temporal patches, each height × width patches of 14 pixels, before `text` tokens."""
    visual, video = frames * height * width // 4, model.config.video_token_id
    ids = torch.cat([torch.full((visual,), video), torch.arange(text)])[None]
    targets = torch.full_like(ids, -100)
    targets[0, -labels:] = ids[0, -labels:]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == video).long() * 2,
        "labels": targets,
        "pixel_values_videos": torch.randn(4 * visual, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([[frames, height, width]]),
        "second_per_grid_ts": [1.0],
    }


def counts_of(batch):
    grids = tuple((frames, height // 2, width // 2) for frames, height, width in batch["video_grid_thw"].tolist())
    return dataclasses.replace(BatchCounts.from_batch(batch), grids=grids)


@pytest.fixture
def model(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").train()


def test_by_hand(model):
    """Text: 2 layers of width 64, 4 heads of 16, 2 key heads, MLP 64. Vision: 2 blocks of width 32, 4 heads, MLP 32."""
    count = StepFlops(model)(counts_of(batch_of(model)))
    patches, tokens, labels = 2 * 6 * 20, 60 + 30, 12
    per_layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 64
    block = 32 * 96 + 32 * 32 + 3 * 32 * 32
    vocabulary = model.get_output_embeddings().weight.shape[0]
    weights = 3 * 2 * (2 * per_layer * tokens + 64 * vocabulary * labels + 2 * block * patches)
    weights += 2 * 2 * 3 * 2 * 14 * 14 * 32 * patches  # pixels have no gradient
    weights += 3 * 2 * (128 * 128 + 128 * 64) * patches // 4
    assert count.weights == weights
    assert count.text_attention == 3 * 2 * 2 * 4 * 16 * 2 * (tokens * (tokens + 1) / 2)
    # one block looks at whole frames, the other at windows of 16 × 16 patches, which cut 6 × 20 into 6 × 16 and 6 × 4
    pairs = 2 * (6 * 20) ** 2 + 2 * ((6 * 16) ** 2 + (6 * 4) ** 2)
    assert count.vision_attention == 3 * 2 * 2 * 4 * 8 * pairs


@pytest.mark.parametrize("frozen", [[], ["vision_tower"], ["vision_tower", "merger"], ["language_model"]])
def test_agrees_with_the_counter_of_torch(model, frozen):
    """Eager attention computes the whole square, of which the model needs the causal half."""
    freeze(model, frozen)
    batch = batch_of(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    positions = (batch["labels"][0, 1:] != -100).nonzero().squeeze(1)
    with FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=positions, use_cache=False).logits.sum().backward()
    count = StepFlops(model)(counts_of(batch))
    tokens = batch["input_ids"].shape[1]
    whole = count.weights + count.text_attention * 2 * tokens / (tokens + 1) + count.vision_attention
    assert counter.get_total_flops() == pytest.approx(whole, rel=0.02)


def test_padding_is_not_counted_and_samples_add_up(model):
    short, long = batch_of(model, text=20), batch_of(model, text=50)
    both = dict(long)
    length = long["input_ids"].shape[1]
    for key, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padded = torch.nn.functional.pad(short[key], (0, length - short[key].shape[1]), value=value)
        both[key] = torch.cat([long[key], padded])
    both["video_grid_thw"] = torch.cat([long["video_grid_thw"], short["video_grid_thw"]])
    count = StepFlops(model)
    for whole, *parts in zip(*(count(counts_of(batch)) for batch in (both, long, short)), strict=True):
        assert whole == sum(parts) > 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", None),
        ("Some Other Card", None),
    ],
)
def test_peaks_by_device_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert get_peak_flops(torch.device("cuda", 0)) == (tflops and tflops * 1e12)
    assert get_peak_flops(torch.device("cpu")) is None


def test_the_log_has_the_share_of_the_peak(write_config, monkeypatch, tmp_path):
    from swim_fast.training import trainer
    from tests.training.conftest import history, run_here

    run_here(write_config("cpu"))
    assert all("mfu" not in entry and entry["tokens_per_second"] > 0 for entry in history(tmp_path / "cpu"))
    monkeypatch.setattr(trainer, "get_peak_flops", lambda device: 1e9)
    counted = []
    call = flops.StepFlops.__call__
    monkeypatch.setattr(
        flops.StepFlops, "__call__", lambda self, batch: counted.append(call(self, batch)) or counted[-1]
    )
    run_here(write_config("known"))
    logs = history(tmp_path / "known")
    assert len(logs) == len(counted) == 2
    seconds = [sum(count) / (entry["mfu"] * 1e9) for count, entry in zip(counted, logs, strict=True)]
    assert all(0 < second < 60 for second in seconds)


def test_the_model_card_says_what_the_model_is(write_config, tmp_path):
    from tests.training.conftest import run_here

    config = write_config(training={"max_steps": 3})
    run_here(config)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained with position ids by the rule of pretraining" in card
    for words in ("fine-tuned for 3 steps", "train.jsonl | 1 | all", "layers 0, 1", "train_loss", "criterion: kl"):
        assert words in card, words
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    load = code.split("\ncontent")[0].replace('folder = "."', f"folder = {str(tmp_path / 'run')!r}")
    names = {}
    exec(load, names)
    assert names["model"].config.model_type == "qwen2_5_vl" and names["processor"].tokenizer
