"""Which folders count as checkpoints, which are kept, and what a run may resume from."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from swim_fast.config import ConfigError
from swim_fast.training.checkpoints import Layout, SaveError, check_resumable, find_last_checkpoint, list_checkpoints
from tests.training.conftest import run_here


def checkpoint(folder, name: str, complete: bool = True):
    path = folder / name
    path.mkdir(parents=True)
    if complete:
        (path / "trainer_state.json").write_text("{}")
    return path


def arguments(ranks: int, batch: int, accumulation: int, deepspeed: dict | None = None, fsdp: bool = False):
    values = {"zero_optimization.stage": 0, **(deepspeed or {})}
    return SimpleNamespace(
        world_size=ranks,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        fsdp=fsdp,
        hf_deepspeed_config=SimpleNamespace(get_value=values.get) if deepspeed else None,
    )


def test_only_whole_checkpoints_count_in_the_order_of_their_steps(tmp_path, caplog):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-10-copy", "incomplete"):
        checkpoint(tmp_path, name)
    checkpoint(tmp_path, "checkpoint-11", complete=False)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert "checkpoint-11 is incomplete" in caplog.text
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert find_last_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        ((8, 1, 4), (8, 1, 4), None),
        ((8, 1, 4), (4, 2, 4), None),
        ((8, 1, 4), (1, 1, 32), None),
        ((8, 1, 4), (4, 2, 2), "set training.per_device_train_batch_size=2 training.gradient_accumulation_steps=4"),
        ((8, 1, 4), (2, 3, 1), "set training.per_device_train_batch_size=1 training.gradient_accumulation_steps=16"),
        ((8, 1, 4), (6, 1, 4), "= 32 samples per step; .* choose another number of ranks"),
    ],
)
def test_any_number_of_ranks_goes_on_if_a_step_has_as_many_samples(tmp_path, saved, now, message):
    path = checkpoint(tmp_path, "checkpoint-5")
    Layout(*saved).write(path)
    if message is None:
        check_resumable(path, arguments(*now))
        return
    with pytest.raises(ConfigError, match=message) as error:
        check_resumable(path, arguments(*now))
    assert f"{path} was saved by 8 ranks" in str(error.value)


def test_deepspeed_goes_on_with_as_many_ranks_or_from_a_universal_checkpoint(tmp_path):
    path = checkpoint(tmp_path, "checkpoint-5")
    (path / "latest").write_text("global_step5")
    Layout(4, 1, 1, 2).write(path)
    stage2 = {"zero_optimization.stage": 2}
    check_resumable(path, arguments(4, 1, 1, stage2))
    for now in (arguments(2, 1, 2, stage2), arguments(4, 1, 1, {"zero_optimization.stage": 3})):
        with pytest.raises(ConfigError, match="saved by 4 ranks with DeepSpeed ZeRO-2") as error:
            check_resumable(path, now)
        assert f"--input_folder {path}/global_step5 --output_folder {path}/global_step5_universal" in str(error.value)
    check_resumable(path, arguments(2, 1, 2, {**stage2, "checkpoint.load_universal": True}))
    with pytest.raises(ConfigError, match="with DeepSpeed ZeRO-2, and its optimizer state can only be read so"):
        check_resumable(path, arguments(4, 1, 1))


def test_fsdp_goes_on_with_any_number_of_ranks_that_divide_the_model(tmp_path):
    path = checkpoint(tmp_path, "checkpoint-5")
    Layout(4, 1, 1, fsdp=True).write(path)
    check_resumable(path, arguments(2, 1, 2, fsdp=True))
    with pytest.raises(ConfigError, match="by 4 ranks with FSDP, .* set training.deepspeed and training.fsdp likewise"):
        check_resumable(path, arguments(4, 1, 1))
    Layout(4, 1, 1).write(path)
    with pytest.raises(ConfigError, match="by 4 ranks without DeepSpeed and FSDP"):
        check_resumable(path, arguments(4, 1, 1, fsdp=True))


def test_a_checkpoint_without_layout_is_taken_as_it_is(tmp_path):
    check_resumable(checkpoint(tmp_path, "checkpoint-5"), arguments(3, 1, 1))


def test_the_best_checkpoint_is_kept_under_its_own_name(write_config, tmp_path, records):
    best = {"metric_for_best_model": "eval_own_loss", "greater_is_better": True, "load_best_model_at_end": True}
    steps = {"max_steps": 3, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    data = {"train": [{"path": str(records)}], "eval": {"own": {"path": str(records), "limit": 2}}}
    run_here(write_config(data=data, training={**best, **steps, "learning_rate": 1e-3, "save_total_limit": 1}))
    folder = tmp_path / "run"
    state = json.loads((folder / "trainer_state.json").read_text())
    found = {log["step"]: log["eval_own_loss"] for log in state["log_history"] if "eval_own_loss" in log}
    highest = max(found, key=found.get)
    assert highest < 3  # the loss falls; its highest value is called the best here, so that it is not the newest's
    assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{highest}")
    written = json.loads((folder / f"checkpoint-{highest}" / "trainer_state.json").read_text())
    assert written["best_model_checkpoint"] == str(folder / f"checkpoint-{highest}")
    assert list_checkpoints(folder) == [folder / f"checkpoint-{highest}"]
    assert not (folder / "incomplete").exists()


def test_a_model_that_cannot_be_saved_leaves_no_half_of_it(write_config, tmp_path):
    from swim_fast.config import load_config
    from swim_fast.training.run import build_trainer

    trainer = build_trainer(load_config(write_config()))
    folder = tmp_path / "run"
    blocked = folder / "incomplete"

    def save(output_dir, state_dict=None):
        (blocked / "half").parent.mkdir(parents=True)
        (blocked / "half").write_text("…")
        raise OSError(28, "No space left on device")

    trainer._save = save
    with pytest.raises(
        SaveError, match="the trained model could not be saved in .*No space left on device.* start again"
    ):
        trainer.save_final_model(Path(trainer.args.output_dir))
    assert not blocked.exists()


def test_a_checkpoint_saved_before_its_evaluation_is_the_best_and_is_kept(write_config, tmp_path):
    from swim_fast.config import load_config
    from swim_fast.training.run import build_trainer

    steps = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 1}
    trainer = build_trainer(load_config(write_config(training=steps)))
    trainer.train()
    folder = tmp_path / "run"
    trainer.state.best_global_step = 1  # as an evaluation after the save finds
    for step in (2, 3):
        trainer.state.global_step = step
        trainer._save_checkpoint(trainer.model, None)
        assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-1")
        written = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert written["best_model_checkpoint"] == str(folder / "checkpoint-1")
        assert list_checkpoints(folder) == [folder / "checkpoint-1", folder / f"checkpoint-{step}"]
