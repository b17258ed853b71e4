"""What a resumed run says and does, and who may write to its folder."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from swim_fast.cli import main
from swim_fast.config import ConfigError, load_config
from swim_fast.training.resume import LOCK, output_lock
from tests.training.conftest import command, environment, run_here, text_record, write_records

SAVED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}


@pytest.fixture
def config(write_config, tmp_path):
    """Two steps on text, each with a checkpoint."""
    data = write_records(tmp_path / "text.jsonl", [text_record(number) for number in range(3)])
    return write_config(data={"train": [{"path": str(data)}]}, training=SAVED)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_finished_run_is_left_as_it_is(config, tmp_path, caplog):
    run_here(config)
    before = contents(tmp_path / "run")
    run_here(config, "training.learning_rate=1.0", resume=True)
    assert "is finished (2 steps) and is left as it is" in caplog.text
    assert contents(tmp_path / "run") == before
    # without its weights it is not: they are saved again, without a speed at which nothing was trained
    (tmp_path / "run" / "model.safetensors").unlink()
    run_here(config, resume=True)
    assert "train_loss" not in (tmp_path / "run" / "README.md").read_text()
    # nor with more steps to do
    run_here(config, "training.max_steps=3", resume=True)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_nothing_to_resume_is_said(config, tmp_path, caplog):
    run_here(config, resume=True)
    assert "there is nothing to resume" in caplog.text and (tmp_path / "run" / "checkpoint-2").is_dir()


def test_what_a_checkpoint_would_keep_is_refused_by_name_and_the_rest_takes_effect(config, tmp_path):
    run_here(config)
    more = "training.max_steps=3"
    for override, text in (
        (
            "training.learning_rate=0.5",
            "training.learning_rate is 0.5, but .*checkpoint-2 was .* with 0.01",
        ),
        ("training.weight_decay=0.1", "training.weight_decay is 0.1, .* with 0.0"),
        ("optimization.learning_rates.merger=0.1", "optimization.learning_rates is"),
        ("model.freeze=[merger]", "model.freeze is"),
        ("training.seed=4", "training.seed is 4, .* the order of the samples would keep"),
    ):
        before = contents(tmp_path / "run")
        with pytest.raises(ConfigError, match=text):
            run_here(config, more, override, resume=True)
        assert contents(tmp_path / "run") == before
    run_here(config, more, "training.learning_rate=1e-2", "attention_loss.text_weight=0.5", resume=True)
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert saved.attention_loss.text_weight == 0.5 and saved.training["max_steps"] == 3


def test_a_second_run_into_a_folder_is_refused(config, tmp_path, capsys):
    holder = "import sys, time; from pathlib import Path; from swim_fast.training.resume import output_lock\n"
    holder += "with output_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    words = [*command()[:1], "-c", holder, str(tmp_path / "run")]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert main(["train", str(config)]) == 2
        assert "another run is writing to" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    with output_lock(tmp_path / "run"):  # a killed run leaves no lock
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr("swim_fast.training.run.resolve_run", lambda config: pytest.fail("the model was loaded"))
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="training.output_dir is .* cannot be written"):
        run_here(config)


def test_a_rank_ends_with_its_launcher(tmp_path):
    rank = "import os, time; from swim_fast.training.resume import end_with_launcher\n"
    rank += "end_with_launcher(0.05); print(os.getpid(), flush=True); time.sleep(100)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    words = [*command()[:1], "-c", launcher]
    process = subprocess.Popen(words, env=environment() | {"LOCAL_RANK": "0"}, stdout=subprocess.PIPE, text=True)
    number = int(process.stdout.readline())
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    try:
        while alive(number):
            assert time.monotonic() < end, "the rank lives on"
            time.sleep(0.05)
    finally:
        if alive(number):
            os.kill(number, signal.SIGKILL)


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
