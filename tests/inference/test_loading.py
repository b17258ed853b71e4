"""What a checkpoint that cannot be used says in describe and evaluate: one line each, naming it."""

import json
import shutil

import pytest
import torch

from swim_fast.cli import main
from swim_fast.errors import OptionError, UserError
from swim_fast.inference.loading import CheckpointError, load_checkpoint, load_model, load_processor
from swim_fast.options import Inference
from tests.training.conftest import checkpoint, square_clip  # noqa: F401


def junk(name):
    return lambda folder: (folder / name).write_bytes(b"{ no such file")


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def lost(name):
    return lambda folder: (folder / name).unlink()


def without_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "norm" not in key}, folder / "model.safetensors")


def other_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] //= 2
    (folder / "config.json").write_text(json.dumps(config))


def text_alone(folder):
    (folder / "processor_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


DAMAGES = {
    "no weights": (lost("model.safetensors"), "no file named model.safetensors"),
    "weights cut": (cut("model.safetensors"), "is no checkpoint that can be loaded: SafetensorError"),
    "weights of nothing": (junk("model.safetensors"), "SafetensorError"),
    "weights missing": (without_weights, "lacks"),
    "weights of other shapes": (other_shapes, "is no checkpoint that can be loaded"),
    "no config": (lost("config.json"), "is no checkpoint that can be loaded"),
    "config": (junk("config.json"), "is no checkpoint that can be loaded"),
    "a list as config": (lambda folder: (folder / "config.json").write_text("[]"), "TypeError"),
    "no tokenizer": (lost("tokenizer.json"), "its tokenizer.json is missing"),
    "tokenizer": (junk("tokenizer.json"), "is no checkpoint that can be loaded"),
    "a tokenizer without tokens": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "KeyError"),
    "no processor": (lost("processor_config.json"), "is no checkpoint that can be loaded"),
    "a model of text alone": (text_alone, "takes neither video nor images"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(checkpoint, tmp_path, damage):  # noqa: F811
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    spoil, reason = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(CheckpointError) as refused:
        load_processor(folder)
        load_model(folder, Inference(device="cpu"))
    assert str(refused.value).startswith(f"model '{folder}' ") and reason in str(refused.value)
    assert "\n" not in str(refused.value) and isinstance(refused.value, UserError)


@pytest.mark.parametrize("job", ["describe", "questions", "grounding"])
@pytest.mark.parametrize("damage", ["absent", "weights", "processor"])
def test_one_line_in_every_job(checkpoint, tmp_path, capsys, job, damage):  # noqa: F811
    folder, file = tmp_path / "run", tmp_path / "q.json"
    if damage != "absent":
        shutil.copytree(checkpoint, folder)
        junk({"weights": "model.safetensors", "processor": "processor_config.json"}[damage])(folder)
    square_clip(tmp_path / "a.mp4", 0)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A"}]
    record = {"video": "a.mp4", "Question": "What?", "options": ["(A) x", "(B) y"], "Answer": "A"}
    file.write_text(json.dumps([{**record, "conversations": turns, "annotation": []}]))
    words = ["evaluate", job, folder, file, "--out", tmp_path / "out", "--workers", 0]
    if job == "describe":
        words = ["describe", tmp_path / "a.mp4", "What?", "--model", folder]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.splitlines()[-1].replace("--model", "model")
    assert said.startswith(f"swim-fast: model '{folder}' is no checkpoint that can be loaded: ")


def test_options_of_weights(checkpoint):  # noqa: F811
    model, processor = load_checkpoint(checkpoint, Inference(dtype="bfloat16", attention="eager", device="cpu"))
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager" and not model.training
    assert hasattr(processor, "video_processor")
    with pytest.raises(OptionError, match="--device cuda:99 cannot be used here"):
        load_model(checkpoint, Inference(device="cuda:99"))
    with pytest.raises(CheckpointError, match="no_such_attention"):
        load_model(checkpoint, Inference(attention="no_such_attention", device="cpu"))
