"""The recipes in `configs/`, dry-run on the geometry that they are for, without its weights."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from swim_fast.config import DataConfig, ModelConfig, load_config
from swim_fast.options import AttentionLoss
from swim_fast.training.dry_run.report import dry_run
from tests.training import real_geometry
from tests.training.conftest import TEXTS, record, square_clip, text_record, write_records

CONFIGS = Path(__file__).parents[2] / "configs"
GPUS = {  # how many, and GiB of each
    "qwen2_5_vl_7b_8xh100": (8, 80),
    "qwen2_5_vl_7b_8xa100": (8, 40),
    "released_code": (8, 80),
    "long_video": (8, 80),
    "long_video_sp4_8xh100": (8, 80),
    "million_tokens_16xh100": (16, 80),
    "lora_24gb": (1, 24),
}
SMALL = ("million_tokens_16xh100",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real_geometry.write_folder(tmp_path_factory.mktemp("seven billion"), TEXTS * 3)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return real_geometry.write_folder(tmp_path_factory.mktemp("three billion"), TEXTS * 3, "Qwen2.5-VL-3B")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for number, count in enumerate((8, 12, 40)):
        masks = square_clip(folder / f"{number}.mp4", number, count=count, height=360, width=640)
        lines.append(record(f"{number}.mp4", masks))
    return write_records(folder / "train.jsonl", [*lines, text_record(0)])


def test_every_recipe_is_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*GPUS, "demo"}


def with_marks(name, *values):
    return pytest.param(name, *values, marks=[pytest.mark.needs("peft")] if name == "lora_24gb" else [])


@pytest.mark.parametrize("name", [with_marks(name) for name in GPUS])
def test_recipe_fits_its_gpus(name, folder, small_folder, data, monkeypatch, tmp_path):
    folder = small_folder if name in SMALL else folder
    monkeypatch.chdir(CONFIGS.parent)  # recipes name DeepSpeed's files from there
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path))
    # torchcodec needs a system FFmpeg
    mine = [f"model.path={folder}", f"data.train=[{{path: {data}}}]", "data.reader=decord"]
    config = load_config(CONFIGS / f"{name}.yaml", mine)
    gpus, memory = GPUS[name]
    report = dry_run(config, gpus=gpus, gpu_memory=memory)
    assert report.fits and "fits:" in str(report)
    assert report.estimates["limit"].total <= memory * 2**30, str(report)
    adapters = 40_370_176 if name == "lora_24gb" else 0  # 16 · Σ (in + out) over the 196 linear layers
    total = real_geometry.SMALL_TOTAL if name in SMALL else real_geometry.TOTAL
    assert f"{(total + adapters) / 1e9:.2f} B parameters" in str(report)


def test_number_of_parameters_of_the_parts(folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path))
    overrides = [f"model.path={folder}", f"data.train=[{{path: {data}}}]", "data.reader=decord"]
    assert real_geometry.TOTAL == 8_292_166_656
    text = str(dry_run(load_config(CONFIGS / "released_code.yaml", overrides), gpus=8))
    found = {}
    for line in text.splitlines():
        for part in ("vision tower", "merger", "language model", "head"):
            if line.strip().startswith(part + " "):
                found[part] = [int(word.replace(",", "")) for word in line.split(part)[1].split()[:2]]
    assert found == {
        "vision tower": [0, real_geometry.VISION_TOWER],
        "merger": [real_geometry.MERGER, 0],
        "language model": [real_geometry.LANGUAGE_MODEL, 0],
        "head": [real_geometry.HEAD, 0],
    }


@pytest.mark.parametrize(
    "name, changes",
    [
        ("long_video", ["training.gradient_checkpointing=false"]),
        ("qwen2_5_vl_7b_8xh100", ["training.deepspeed=null"]),
        ("qwen2_5_vl_7b_8xa100", ["training.gradient_checkpointing=false", "model.activation_offload=false"]),
        ("long_video_sp4_8xh100", ["training.sequence_parallel=1"]),
        ("million_tokens_16xh100", ["training.sequence_parallel=4"]),
        with_marks("lora_24gb", ["model.lora={rank: 16}"]),
    ],
)
def test_recipe_without_what_it_states_does_not_fit(name, changes, folder, small_folder, data, monkeypatch, tmp_path):
    folder = small_folder if name in SMALL else folder
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path))
    overrides = [f"model.path={folder}", f"data.train=[{{path: {data}}}]", "data.reader=decord", *changes]
    gpus, memory = GPUS[name]
    report = dry_run(load_config(CONFIGS / f"{name}.yaml", overrides), gpus=gpus, gpu_memory=memory)
    assert report.estimates["limit"].total > memory * 2**30, str(report)


def test_released_code_is_as_released():
    config = load_config(CONFIGS / "released_code.yaml")
    loss = config.attention_loss
    assert (loss.prediction, loss.query_position, loss.softmax) == ("released", "predictor", "full")
    assert (loss.text_weight, loss.mask_weight, loss.fusion, loss.criterion) == (0.05, 1.0, "product", "bce")
    assert (loss.resolution, loss.layers, loss.supervise) == ("mask", None, "second")
    assert (config.data.seconds_per_patch, config.data.label_header) == ("one", True)


def test_the_recipes_of_the_paper_take_its_equations():
    for name in ("qwen2_5_vl_7b_8xh100", "qwen2_5_vl_7b_8xa100"):
        config = load_config(CONFIGS / f"{name}.yaml")
        assert config.attention_loss == AttentionLoss() and config.model.position_ids == "pretraining"
        assert [source.limit for source in config.data.train] == [125_000, 100_000, 10_000]
        assert config.training["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("name", GPUS)
def test_recipe_states_only_what_differs_from_the_defaults(name):
    from transformers import TrainingArguments

    tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    sections = {"model": ModelConfig, "data": DataConfig, "attention_loss": AttentionLoss}
    sections["training"] = TrainingArguments
    for section, kind in sections.items():
        fields = kind.model_fields.values() if section != "training" else dataclasses.fields(kind)
        names = kind.model_fields if section != "training" else (field.name for field in fields)
        defaults = {name: field.default for name, field in zip(names, fields, strict=True)} | {"sequence_parallel": 1}
        for key, value in tree.get(section, {}).items():
            assert value != defaults[key], f"{section}.{key}"
