"""Runs that leave out too many samples."""

import pytest

from swim_fast.training.skipped import FEWEST, WINDOW, SkipLimit, SkippedError
from tests.training.conftest import record, run, run_here, square_clip, write_records


def judge(steps, share=0.2, saving=False) -> int | None:
    """Index of the step that stops the run, from 1; None if none does."""
    limit = SkipLimit(share)
    limit.note(["clip.mp4 is missing"])
    for step, (samples, skipped) in enumerate(steps, 1):
        try:
            limit.check_step(step, samples, skipped, saving)
        except SkippedError as error:
            assert f"step {step}: " in str(error) and "clip.mp4 is missing" in str(error)
            return step
    return None


def test_a_share_is_judged_over_recent_samples():
    assert judge([(10, 2)] * 100) is None
    assert judge([(10, 3)] * 100) == WINDOW // 10  # not before there are enough samples
    assert judge([(10, 0)] * 100 + [(10, 5)] * 100) == 105  # those long ago do not excuse
    assert judge([(10, 5)] * 100, share=0.5) is None


def test_steps_without_any_sample_stop_at_once():
    assert judge([(10, 0), (FEWEST, FEWEST)], share=1.0) == 2
    assert judge([(1, 0)] + [(1, 1)] * 20, share=1.0) == 1 + FEWEST
    assert judge([(1, 0), (1, 1)] * 20, share=1.0) is None  # a bad record costs that record alone


def test_nothing_is_saved_before_a_sample_was_trained_on():
    assert judge([(1, 1)], saving=True) == 1
    assert judge([(1, 0), (1, 1)], saving=True) is None


def test_all_ranks_stop_where_no_clip_can_be_read(write_config, tmp_path):
    masks = square_clip(tmp_path / "0.mp4", 0)
    data = write_records(tmp_path / "data.jsonl", [record(f"gone/{n}.mp4", masks) for n in range(8)])
    steps = {"max_steps": 30, "save_strategy": "steps", "save_steps": 1}
    config = write_config(data={"train": [{"path": str(data)}]}, training=steps)
    said = run("train", config, ranks=2, code=1)
    assert said.count("exitcode  : 2") >= 1
    assert "step 1: all of the last 4 samples were left out" in said and "gone/" in said
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "README.md").exists()


def test_the_model_card_counts_samples_left_out(write_config, tmp_path):
    masks = square_clip(tmp_path / "0.mp4", 0)
    names = ["0.mp4", "gone.mp4", "0.mp4", "0.mp4"]
    data = write_records(tmp_path / "data.jsonl", [record(name, masks) for name in names])
    run_here(write_config(data={"train": [{"path": str(data)}]}, training={"max_steps": 2, "logging_steps": 5}))
    assert "\nLeft out of training for their problems: 1 sample.\n" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_share(write_config, share):
    from swim_fast.config import ConfigError, load_config

    with pytest.raises(ConfigError, match="data.max_skipped is"):
        load_config(write_config(data={"max_skipped": share}))
