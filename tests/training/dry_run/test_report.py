"""`swim-fast train --dry-run` on a tiny model: what it prints, and that it needs no weights."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from swim_fast.cli import main
from swim_fast.config import ConfigError, load_config
from swim_fast.errors import UserError
from swim_fast.options import Source
from swim_fast.training.dry_run.report import dry_run
from swim_fast.training.dry_run.text import draw_histogram, format_table


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def without_weights(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "no weights")
    (folder / "model.safetensors").unlink()
    return folder


def report_of(path, *overrides, **options):
    return dry_run(load_config(path, overrides), **options)


def cells(text: str, start: str) -> list[str]:
    """The line of the text that starts so, without its start, in words."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(start)]
    assert len(lines) == 1, (start, lines)
    return lines[0].removeprefix(start).split()


def test_command_prints_everything_and_trains_nothing(write_config, without_weights, tmp_path, capsys):
    path = write_config(model={"path": str(without_weights), "freeze": ["vision_tower"]})
    assert main(["train", str(path), "--dry-run", "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    config = json.loads((without_weights / "config.json").read_text())
    embeddings = config["text_config"]["vocab_size"] * config["text_config"]["hidden_size"]
    assert int(cells(text, "vision tower")[0].replace(",", "")) == 0
    assert int(cells(text, "vision tower")[1].replace(",", "")) > 1000
    assert int(cells(text, "language model")[0].replace(",", "")) > embeddings
    assert cells(text, "head")[:2] == ["0", "0"]  # tied to the embeddings, which are counted once
    assert cells(text, "train.jsonl")[:2] == ["8", "8"]
    assert cells(text, "global batch") == "4 samples = 2 sample(s) × 1 × 2 GPU(s)".split()
    assert cells(text, "steps per epoch") == ["2"]  # eight samples, four a step
    assert "fits:" in text and "no DeepSpeed" in text
    assert not (tmp_path / "run").exists()


def test_fsdp_divides_the_model(write_config, without_weights):
    path = write_config(model={"path": str(without_weights)}, training={"fsdp": True})
    text = str(report_of(path, gpus=2))
    assert "FSDP2" in text and cells(text, "gathered parameters")


def test_ranks_that_share_samples(write_config, without_weights):
    """Eight samples, two a batch, among two groups of two GPUs."""
    path = write_config(model={"path": str(without_weights)})
    report = report_of(path, "training.sequence_parallel=2", gpus=4)
    text = str(report)
    assert "samples shared by 2" in text
    assert cells(text, "global batch") == "4 samples = 2 sample(s) × 1 × 4 GPU(s) / 2 that share each".split()
    assert cells(text, "steps per epoch") == ["2"]
    whole, kept = report_of(path, gpus=4), "activations kept for backward"
    assert report.estimates["longest"].items[kept] < whole.estimates["longest"].items[kept]


def test_mlps_in_tiles(write_config, without_weights):
    path, kept = write_config(model={"path": str(without_weights)}), "activations kept for backward"
    whole, tiled = (report_of(path, f"model.mlp_tiles={tiles}").estimates["longest"] for tiles in (1, 4))
    assert 0 < tiled.items[kept] < whole.items[kept]


@pytest.mark.parametrize("ranks, gpus, message", [(2, 3, "--gpus 4"), (3, 3, "take one of 2, 4")])
def test_ranks_that_cannot_share(write_config, without_weights, ranks, gpus, message):
    path = write_config(model={"path": str(without_weights)})
    with pytest.raises(UserError, match=message):
        report_of(path, f"training.sequence_parallel={ranks}", gpus=gpus)


def test_run_on_the_cpu_has_the_memory_of_the_host(write_config, without_weights):
    text = str(report_of(write_config(model={"path": str(without_weights)}), "training.use_cpu=true"))
    assert "M parameters; GiB on the CPU" in text and "GPU" not in text.replace("GPU's", "")
    assert re.search(r"fits: [\d.]+ of [\d.]+ GiB on the CPU", text)


def test_lengths_are_those_of_the_samples(write_config, checkpoint, records):
    from transformers import AutoProcessor

    from swim_fast.data.batch.dataset import SwimDataset
    from swim_fast.data.sample.builder import SampleBuilder

    path = write_config()
    text = str(report_of(path))
    builder = SampleBuilder(AutoProcessor.from_pretrained(checkpoint), load_config(path).sampling)
    dataset = SwimDataset([Source(path=str(records))], builder)
    lengths = [len(dataset[i].inputs["input_ids"]) for i in range(len(dataset))]
    assert cells(text, "train.jsonl")[2:] == [
        *(f"{int(np.percentile(lengths, p)):,}" for p in (0, 50, 95, 100)),
        "0",
    ]
    assert f"longest ({2 * max(lengths):,} tokens)" in text  # a batch of two, padded


def test_sources_and_records_with_problems(write_config, records, tmp_path):
    bad = tmp_path / "bad.jsonl"
    lines = records.read_text().splitlines()
    missing = {**json.loads(lines[0]), "video": "nowhere.mp4"}
    bad.write_text("\n".join([json.dumps(missing), lines[3], json.dumps(missing)]) + "\n")
    sources = [{"path": str(records)}, {"path": str(bad), "media": str(records.parent), "name": "bad ones"}]
    text = str(report_of(write_config(data={"train": sources})))
    assert cells(text, "train.jsonl")[-1] == "0" and cells(text, "bad ones")[-1] == "2"
    assert "swim-fast data check" in text
    only_bad = [{"path": str(bad), "limit": 1}]
    with pytest.raises(ConfigError, match="no record of data.train can be used"):
        report_of(write_config(data={"train": only_bad}))


def test_a_share_of_the_records_is_measured(write_config):
    report = str(report_of(write_config(), limit=3))
    assert cells(report, "train.jsonl")[:2] == ["8", "3"] and "drawn from those that were" in report
    assert cells(report, "samples per epoch") == ["8"]


def test_steps_as_the_trainer_has_them(write_config):
    """Eight samples, two a batch, three batches a step, of which the last of an epoch has one."""
    from swim_fast.training.run import build_trainer

    training = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 3}
    path = write_config(training={**yaml.safe_load(write_config().read_text())["training"], **training})
    trainer = build_trainer(load_config(path))
    of_trainer = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    text = str(report_of(path))
    found = int(cells(text, "steps per epoch")[0]), int(cells(text, "steps in all")[0])
    assert found == (2, 6)
    assert all(steps in of_trainer for steps in found), of_trainer


def test_packed_batches(write_config):
    training = {"per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 2}
    settings = {**yaml.safe_load(write_config().read_text())["training"], **training}
    data = {"max_tokens_per_batch": 150}
    text = str(report_of(write_config(data=data, training=settings), gpus=2))
    assert "pack of up to 150 tokens" in text and "limit (150 tokens)" in text
    longest = int(cells(text, "tokens of a GPU's batch, longest")[0])
    assert 75 < longest <= 150
    assert int(cells(text, "steps per epoch")[0]) >= 2
    assert int(cells(text, "steps in all")[0]) == 2 * int(cells(text, "steps per epoch")[0])


def test_verdict_and_what_to_change(write_config, tmp_path, capsys):
    path = write_config(training={"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "run")})
    assert main(["train", str(path), "--dry-run", "--gpu-memory", "1.0"]) == 1  # the context alone takes 2 GiB
    text = capsys.readouterr().out
    assert "does not fit" in text and "1. " in text and "more GPUs" in text
    zero = write_config(training={"deepspeed": "configs/deepspeed/zero2.json", "bf16": True})
    report = report_of(zero, f"training.output_dir={tmp_path}/run", gpus=4)
    assert "DeepSpeed ZeRO-2" in str(report)
    one = report_of(zero, f"training.output_dir={tmp_path}/run", gpus=1)
    ratio = one.estimates["longest"].items["optimizer states"] / report.estimates["longest"].items["optimizer states"]
    assert ratio == pytest.approx(4)


@pytest.mark.needs("peft")
def test_adapters(write_config, checkpoint):
    model = {"path": str(checkpoint), "freeze": ["vision_tower"], "lora": {"rank": 4}}
    text = str(report_of(write_config(model=model)))
    assert cells(text, "language model")[0] == "0"
    # of each of two layers: q and o 64 → 64, k and v 64 → 32, MLP 64 → 64 three times, rank 4
    assert int(cells(text, "adapters")[0].replace(",", "")) == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 128)
    quantized = str(report_of(write_config(model={**model, "lora": {"rank": 4, "quantize": "nf4"}})))
    assert "a weight without quantisation" in quantized


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.path=nowhere/at/all", "is no checkpoint that can be loaded"),
        ("attention_loss.layers=[7]", "out of range"),
        ("training.deepspeed=nowhere.json", "is 'nowhere.json', which cannot be read"),
        ("data.train=[]", "data.train is empty"),
        ("training.lerning_rate=1", "learning_rate"),
    ],
)
def test_kind_errors(write_config, override, message):
    with pytest.raises(ValueError, match=message):
        report_of(write_config(), override)
    with pytest.raises(ConfigError, match="must all be positive"):
        report_of(write_config(), gpus=0)


def test_launcher_variables_are_not_waited_for(write_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert "8 GPU(s)" in str(report_of(write_config()))


def test_table_and_histogram_are_aligned():
    lines = format_table([("name", "n"), ("a", "1,000"), ("longer", "7")])
    assert lines == ["  name        n", "  ------  -----", "  a       1,000", "  longer      7"]
    values = np.array([1, 1, 2, 100])
    bars = draw_histogram(values, bars=2, width=6)
    assert bars == ["   1 –  50  3  ######", "  51 – 100  1  ##"]
    assert len(draw_histogram(np.array([5, 5]))) == 1
