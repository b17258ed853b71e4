"""Runs whose ranks share their samples are those of one rank, with every engine; what cannot be shared is refused."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from swim_fast.config import ConfigError, load_config
from swim_fast.errors import OptionError
from swim_fast.modeling.sequence_parallel import check_group_size, find_group_sizes
from swim_fast.training.checkpoints import Layout
from tests.training.conftest import (
    ROOT,
    SEED,
    history,
    launch,
    record,
    run,
    run_command,
    run_here,
    square_clip,
    weights,
    write_records,
)

LOGGED = ("loss", "text_loss", "mask_loss", "pointing_accuracy", "mass_in_mask", "grad_norm", "pairs_per_step")
STEPS = {"max_steps": 4, "learning_rate": 1e-2, "optim": "adamw_torch", "per_device_train_batch_size": 2}
# Above most gradients, the smallest of which are rounding errors; each step of this order has a picture, as with a
# single rank parameters without gradient are left out, which moments would move.
STEPS |= {"adam_epsilon": 1e-2, "gradient_accumulation_steps": 2, "seed": SEED}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
SLOW = pytest.mark.slow


def case(engine=None, pack=None, *marks, **model):
    return pytest.param(engine or {}, pack, model, marks=marks)


def zero(stage, pack=None):
    return case({"deepspeed": f"configs/deepspeed/zero{stage}.json"}, pack, SLOW, pytest.mark.needs("deepspeed"))


def start(configs, engine, ranks):
    if "fsdp" not in engine:
        return [run("train", path, ranks=ranks) for path in configs]
    return run_command([*launch(ranks), str(ROOT / "tests/helpers/fsdp_on_cpu.py"), *map(str, configs)])


def assert_same(one, shared, rel=2e-5):
    for mine, theirs in zip(history(one), history(shared), strict=True):
        for key in LOGGED:
            assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=rel, abs=1e-6), key
        assert mine.get("skipped") == theirs.get("skipped")
    mine, other = (json.loads((folder / "all_results.json").read_text()) for folder in (one, shared))
    for key in ("loss", "text_loss", "mask_loss", "pairs", "soft_iou"):
        assert mine[f"eval_same_{key}"] == pytest.approx(other[f"eval_same_{key}"], rel=rel), key
    assert mine["skipped_samples"] == other["skipped_samples"]
    assert weights(one).keys() == weights(shared).keys()
    mine, other = (AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32) for folder in (one, shared))
    for (name, value), trained in zip(mine.named_parameters(), other.parameters(), strict=True):
        assert (value - trained).norm() <= 1e-3 * max(value.norm().item(), 1), name


@pytest.fixture
def configure(write_config, unlike):
    """Configurations of one run over records of every kind, two of which give no sample; evaluated twice."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True}

    def write(name, pack=None, model=None, **training):
        data = {"train": [{"path": str(unlike)}], "eval": {"same": {"path": str(unlike), "limit": 3}}}
        if pack:
            data["max_tokens_per_batch"], training["per_device_train_batch_size"] = pack, 1
        return write_config(name, model=model or {}, data=data, training={**STEPS, **often, **training})

    return write


@pytest.mark.parametrize(
    ("engine", "pack", "model"),
    [
        case(),
        case(pack=400),
        case(FSDP),
        case(FSDP, 400, SLOW),
        zero(1, 400),
        zero(2, 400),
        zero(3, 400),
        zero(3),
        case(COMPILED, None, SLOW),
        case({}, None, SLOW, pytest.mark.needs("peft"), lora={"rank": 4}),
    ],
)
def test_two_ranks_of_one_sample_are_one_rank(configure, engine, pack, model):
    """Everything is trained; the videos have an odd number of tokens, or fewer patches than there are ranks."""
    one = configure("one", pack, model)
    shared = configure("shared", pack, model, sequence_parallel=2, **engine)
    run_here(one)
    start([shared], engine, ranks=2)
    assert_same(one.with_suffix(""), shared.with_suffix(""))


@pytest.mark.slow
def test_two_groups_of_two_are_two_ranks(configure):
    two, four = configure("two"), configure("four", sequence_parallel=2)
    run("train", two, ranks=2)
    run("train", four, ranks=4)
    assert_same(two.with_suffix(""), four.with_suffix(""))


def test_a_run_goes_on_with_another_number_of_ranks_a_sample(configure):
    saving = {"save_strategy": "steps", "save_steps": 2}
    one, shared = configure("one", **saving), configure("shared", sequence_parallel=2, **saving)
    run("train", shared, "training.max_steps=2", "training.lr_scheduler_type=constant", ranks=2)
    run_here(one, "training.lr_scheduler_type=constant")
    run_here(shared, "training.sequence_parallel=1", "training.lr_scheduler_type=constant", resume=True)
    assert_same(one.with_suffix(""), shared.with_suffix(""))


@pytest.mark.slow
def test_a_clip_that_one_rank_cannot_decode_is_left_out_by_all(write_config, tmp_path):
    """Damaged at its end: the first rank has its half of the clip, the second has not."""
    lines = [record(f"{i}.mp4", square_clip(tmp_path / f"{i}.mp4", i, count=60)[:1]) for i in range(4)]
    content = bytearray((tmp_path / "0.mp4").read_bytes())
    start = content.index(b"mdat")
    size = int.from_bytes(content[start - 4 : start], "big")
    content[start + size * 19 // 20 : start + size - 4] = bytes(size - 4 - size * 19 // 20)
    (tmp_path / "0.mp4").write_bytes(content)
    path, training = write_records(tmp_path / "damaged.jsonl", lines), {**STEPS, "sequence_parallel": 2}
    config = write_config("run", data={"train": [{"path": str(path)}], "reader": "pyav"}, training=training)
    run("train", config, "training.max_steps=2", "training.gradient_accumulation_steps=1", ranks=2)
    told = [json.loads(line)["problem"] for line in (tmp_path / "run/skipped-rank0.jsonl").read_text().splitlines()]
    assert len(told) == 2 and "0.mp4: cannot be decoded" in told[0]
    assert told[1].endswith("left out with its batch, which the ranks that share it have read differently")
    assert [log.get("skipped") for log in history(tmp_path / "run")].count(2) == 1


def test_ranks_without_a_group_are_refused(configure):
    told = run("train", configure("one", sequence_parallel=2), code=2)
    assert "training.sequence_parallel is 2, and 1 process cannot be divided into groups of 2" in told
    with pytest.raises(ConfigError, match="training.sequence_parallel is 0; it must be at least 1"):
        load_config(configure("none", sequence_parallel=0))
    with pytest.raises(ConfigError, match="training.sequence_parallel is '2'; expected int"):
        load_config(configure("text", sequence_parallel="2"))


def test_sizes_of_a_group_follow_from_the_heads():
    assert find_group_sizes(28, 4) == [2, 4, 28]  # Qwen2.5-VL-7B
    assert find_group_sizes(16, 2) == [2, 4, 8, 16]  # 3B
    assert find_group_sizes(64, 8) == [2, 4, 8, 16, 32, 64]  # 72B


def test_heads_that_cannot_be_divided_are_refused():
    from transformers import Gemma3TextConfig, Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(text_config={"num_attention_heads": 28, "num_key_value_heads": 4})
    check_group_size(config, 4)
    with pytest.raises(OptionError, match="28 heads and 4 key heads .* cannot be divided by it; take one of 2, 4, 28"):
        check_group_size(config, 7)
    with pytest.raises(OptionError, match="gemma3_text has layers of sliding_attention"):
        check_group_size(Gemma3TextConfig(), 2)


def test_samples_of_a_step_are_counted_by_groups():
    assert Layout(ranks=8, batch=2, accumulation=3, sequence_parallel=4).samples == 12
