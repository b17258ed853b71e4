"""`swim-fast config init`: what it writes is read back, fits the GPUs, and replaces nothing."""

import json

import pytest

from swim_fast.cli import main
from swim_fast.config import load_config
from swim_fast.config_init import count_parameters

TEXT = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}
MASK = {"segmentation": {"size": [4, 4], "counts": "04L0"}}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A file of a tagged record, one of text alone, and one of nothing that can be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    value = "<video>\nWhat does the <ins>dog</ins> do?"
    tagged = {
        "video": "a.mp4",
        "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "It runs."}],
        "annotation": [{"0": MASK}],
    }
    (tmp_path / "tagged.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (tagged, TEXT, {})))
    (tmp_path / "text.jsonl").write_text(json.dumps(TEXT) + "\n")
    (tmp_path / "broken.jsonl").write_text("{}\n")
    return tmp_path


def init(*words, media="clips"):
    return main(["config", "init", *words, *(["--media", media] if media else [])])


@pytest.mark.parametrize(
    ("gpus", "memory", "lora", "stage", "offload"),
    [
        ("0", "80", None, None, False),
        ("1", "24", "nf4", None, False),
        ("2", "24", "nf4", None, False),
        ("1", "80", "", None, False),
        ("8", "40", None, 3, True),
        ("4", "80", None, 3, False),
        ("8", "80", None, 3, False),
        ("1", "200", None, None, False),
    ],
)
def test_every_kind_of_gpu_gets_a_configuration_that_reads_back(data, capsys, gpus, memory, lora, stage, offload):
    assert (
        init("run.yaml", "--data", "tagged.jsonl", "--eval", "text.jsonl", "--gpus", gpus, "--gpu-memory", memory) == 0
    )
    assert "swim-fast train run.yaml --dry-run" in capsys.readouterr().out
    config = load_config("run.yaml")
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct" and config.attention_loss is not None
    assert (config.model.lora and (config.model.lora.quantize or "")) == lora
    assert (config.deepspeed() or {}).get("zero_optimization", {}).get("stage") == stage
    assert config.model.activation_offload == offload
    assert (config.training.get("use_cpu", False), "bf16" in config.training) == (gpus == "0", gpus != "0")
    assert config.training["gradient_accumulation_steps"] * max(int(gpus), 1) == 32
    assert (config.data.train[0].path, config.data.train[0].media) == ("tagged.jsonl", "clips")
    assert config.data.eval["held_out"].path == "text.jsonl"


def test_it_says_what_the_records_hold(data):
    init("run.yaml", "--data", "tagged.jsonl", "--gpus", "0")
    assert "3 records; of the first 3, 1 have tagged nouns, and 1 cannot be used" in (data / "run.yaml").read_text()


def test_epochs_end_with_a_short_step(data):
    init("run.yaml", "--data", "tagged.jsonl", "--gpus", "0")
    assert "num_train_epochs: 3 # about 3 steps" in (data / "run.yaml").read_text()  # 3 records, 32 a step


def test_parameters_of_a_local_checkpoint_are_counted(data):
    import torch
    from safetensors.torch import save_file

    (data / "model").mkdir()
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, data / "model" / "model.safetensors")
    assert count_parameters(str(data / "model")) == 22
    init("run.yaml", "--data", "tagged.jsonl", "--model", str(data / "model"), "--gpus", "1", "--gpu-memory", "24")
    text = (data / "run.yaml").read_text()
    assert "all weights are trained" in text and "7B was assumed" not in text


def test_records_without_tags_train_on_text_alone(data):
    init("run.yaml", "--data", "text.jsonl", "--gpus", "0")
    assert load_config("run.yaml").attention_loss is None


def test_a_file_that_exists_is_left_alone(data, capsys):
    (data / "run.yaml").write_text("mine")
    assert init("run.yaml", "--data", "tagged.jsonl") == 2
    assert "run.yaml exists" in capsys.readouterr().err and (data / "run.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--data", "broken.jsonl"], "broken.jsonl has no record that can be read"),
        (["--data", "tagged.jsonl", "--model", "./absent"], "--model './absent' is no checkpoint"),
        (["--data", "tagged.jsonl", "--gpus", "-1"], "--gpus is -1"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(data, capsys, words, message):
    assert init("run.yaml", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (data / "run.yaml").exists()


def test_media_elsewhere_are_told(data, capsys):
    assert init("run.yaml", "--data", "tagged.jsonl", "--gpus", "0", media=None) == 2
    assert "record 0 names" in capsys.readouterr().err


def test_quotes_in_paths_survive(data):
    name = 'a "b": #c.jsonl'
    (data / name).write_text(json.dumps(TEXT) + "\n")
    init("run.yaml", "--data", name, "--gpus", "0")
    assert load_config("run.yaml").data.train[0].path == name
