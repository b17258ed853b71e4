"""What a long run meets: ranks that die, full disks, clips that hang, losses that are not finite, preemption."""

import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from swim_fast.cli import main
from swim_fast.config import load_config
from swim_fast.data.batch.workers import start_worker
from swim_fast.training.checkpoints import find_last_checkpoint
from tests.training.conftest import (
    command,
    environment,
    history,
    record,
    run,
    run_here,
    square_clip,
    text_record,
    weights,
    write_records,
)

STEADY = {"per_device_train_batch_size": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-3}


def losses(folder: Path, key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in history(folder)}


def start(*arguments: str, ranks: int) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments, ranks=ranks),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process, text: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines)[-3000:])


def errors(output: str) -> list[str]:
    """What the command says when it gives up; it may stand behind a progress bar."""
    return re.findall("swim-fast: (.*)", output)


def rank_process(launcher: subprocess.Popen, rank: int) -> int:
    """Process number of a rank below a launcher."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no rank {rank}")


def train_until_a_rank_is_killed(config: Path, folder: Path) -> None:
    """Two ranks, the second of which is killed in some step behind the first checkpoint."""
    process = start("train", str(config), ranks=2)
    while find_last_checkpoint(folder) is None:
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.1)
    os.kill(rank_process(process, 1), signal.SIGKILL)
    begin = time.monotonic()
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert time.monotonic() - begin < 60, "the other rank was not ended"
    assert "Signal 9" in output


def test_after_a_killed_rank_and_a_preemption_the_run_is_the_same(write_config, records, tmp_path, capsys):
    """Two ranks, one killed; two ranks again, preempted; one rank to the end: the losses of a run left in peace."""
    save = {"max_steps": 4000, "save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": 1}
    data = {"train": [{"path": str(records), "weight": 20.0}]}  # a long epoch, so that the workers are at work
    config = write_config(data=data, training={**STEADY, **save})
    folder = tmp_path / "run"
    train_until_a_rank_is_killed(config, folder)

    process = start("train", str(config), "--resume", ranks=2)
    lines = read_until(process, "text_loss")
    process.terminate()  # the launcher, which hands it on
    output = "".join(lines) + process.communicate(timeout=60)[0]
    assert f"resuming from {folder / 'checkpoint-3'}" in output or f"resuming from {folder / 'checkpoint-6'}" in output
    assert "SIGTERM: saving a checkpoint" in output
    saved = find_last_checkpoint(folder)
    assert json.loads((saved / "layout.json").read_text()) == {
        "ranks": 2,
        "batch": 1,
        "accumulation": 1,
        "zero_stage": None,
        "fsdp": False,
        "sequence_parallel": 1,
    }

    # one rank with as many samples per step goes on too; with fewer it is told what to set
    assert main(["train", str(config), "--resume"]) == 2
    (remedy,) = [
        line.partition("would not fit: set ")[2] for line in capsys.readouterr().err.splitlines() if "set " in line
    ]
    assert remedy.split() == ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"]
    until = f"training.max_steps={int(saved.name.split('-')[1]) + 1}"
    run_here(config, until, *remedy.split(), resume=True)
    run_here(config, until, *remedy.split(), f"training.output_dir={tmp_path / 'whole'}")
    for key in ("loss", "pairs_per_step"):
        assert losses(folder, key) == pytest.approx(losses(tmp_path / "whole", key), rel=1e-4)
    assert not list(folder.glob("skipped-*"))  # decoders and workers were signalled as well


@pytest.mark.slow
def test_after_a_killed_rank_of_a_shared_sample_the_run_is_the_same(write_config, tmp_path):
    """Two ranks share samples, one is killed; two go on, then a single one: the losses of one rank left in peace."""
    save = {"max_steps": 4000, "save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 1}
    # four of eight samples a step, six of which have a video: as with a single rank, no part is without gradient
    even = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "adam_epsilon": 1e-2}
    config = write_config(training={**STEADY, **save, **even, "sequence_parallel": 2})
    folder, whole = tmp_path / "run", tmp_path / "whole"
    train_until_a_rank_is_killed(config, folder)
    last = find_last_checkpoint(folder)
    then, end = (f"training.max_steps={int(last.name.split('-')[1]) + more}" for more in (2, 3))
    assert f"resuming from {last}" in run("train", config, then, "--resume", ranks=2)
    alone = "training.sequence_parallel=1"
    run_here(config, end, alone, resume=True)
    run_here(config, end, alone, f"training.output_dir={whole}")
    for key in ("loss", "text_loss", "mask_loss", "grad_norm", "pairs_per_step"):
        assert losses(folder, key) == pytest.approx(losses(whole, key), rel=1e-4), key
    for name, value in weights(whole).items():
        assert (weights(folder)[name] - value).norm() <= 1e-3 * max(value.norm().item(), 1), name


def test_a_data_worker_is_ended_by_its_parent_alone(tmp_path):
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=work, args=(tmp_path / "started",), daemon=True)
    worker.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    for _ in range(2):
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def work(started: Path) -> None:
    start_worker(lambda worker_id: started.touch(), 0)
    time.sleep(100)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_can_go_on(write_config, tmp_path):
    save = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    config = write_config(training={**STEADY, **save})
    whole = write_config("whole", training={**STEADY, **save})
    run_here(whole)
    run_here(config, "training.max_steps=3")
    folder = tmp_path / "run"
    (folder / "model.safetensors").unlink()
    sizes = {file.name: file.stat().st_size for file in (folder / "checkpoint-3").iterdir()}
    limit = (sizes["model.safetensors"] + sizes["optimizer.pt"]) // 2  # the weights fit, the optimizer does not

    def fill_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command("train", str(config), "--resume"),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=fill_disk,
    )
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    (said,) = errors(done.stderr)
    assert f"checkpoint-6 could not be saved in {folder}" in said
    assert "free space" in said and f"resume from {folder / 'checkpoint-3'} with --resume" in said
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoint-3"]
    # nor does a folder that was only half copied take the place of a whole one
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-9")
    (folder / "checkpoint-9" / "trainer_state.json").unlink()
    run_here(config, resume=True)
    assert losses(folder) == losses(tmp_path / "whole")
    assert (folder / "checkpoint-6").is_dir() and not (folder / "checkpoint-3").exists()
    # the end of the run may fail as well: resuming saves the model and does not train a step more
    trained = weights(folder)
    (folder / "model.safetensors").unlink()
    run_here(config, resume=True)
    assert history(folder)[-1]["step"] == 6
    for name, value in weights(folder).items():
        assert torch.equal(value, trained[name]), name


def test_a_run_over_a_clip_that_never_decodes_ends_and_names_it(write_config, tmp_path):
    masks = square_clip(tmp_path / "0.mp4", 0)
    os.mkfifo(tmp_path / "hangs.mp4")
    writer = os.open(tmp_path / "hangs.mp4", os.O_RDWR)  # and never writes: whoever reads the clip waits for ever
    try:
        data = write_records(tmp_path / "data.jsonl", [record("0.mp4", masks), record("hangs.mp4", masks)])
        sections = {"data": {"train": [{"path": str(data)}], "decode_timeout": 1.0}}
        run_here(write_config(**sections, training={**STEADY, "max_steps": 2, "dataloader_num_workers": 1}))
    finally:
        os.close(writer)
    (line,) = (tmp_path / "run" / "skipped-rank0.jsonl").read_text().splitlines()
    problem = json.loads(line)["problem"]
    assert "record 1" in problem and "hangs.mp4" in problem and "longer than the limit of 1 s" in problem
    assert sum(entry.get("skipped", 0) for entry in history(tmp_path / "run")) == 1


@pytest.fixture
def with_a_bad_clip(tmp_path):
    """Five records, of which the clip of the last, bad.mp4, is given an infinite pixel by `tests.training.poisoned`."""
    names = ["0.mp4", "1.mp4", "2.mp4", "bad.mp4"]
    lines = [record(name, square_clip(tmp_path / name, seed)[:4]) for seed, name in enumerate(names)]
    lines[3]["index"] = "bad.mp4"
    return {"train": [{"path": str(write_records(tmp_path / "data.jsonl", [*lines[:3], text_record(0), lines[3]]))}]}


def run_poisoned(config, *overrides: str, ranks: int) -> subprocess.CompletedProcess:
    words = command("train", str(config), *overrides, ranks=ranks)
    at = words.index("swim_fast.cli")
    words[at : at + 1] = ["tests.training.poisoned", "bad.mp4"]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_optimizer(write_config, tmp_path, with_a_bad_clip):
    save = {"max_steps": 40, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    config = write_config(data=with_a_bad_clip, training={**STEADY, **save})
    done = run_poisoned(config, ranks=2)
    assert done.returncode != 0
    said = errors(done.stderr)
    assert said and len(set(said)) == 1  # every rank, whichever had the sample, unless the launcher ends it before
    assert done.stderr.count("exitcode  : 2") >= 1
    step = int(said[0].partition("step ")[2].partition(":")[0])
    assert "the loss is not finite (text loss nan" in said[0]
    assert "data.jsonl:4 (bad.mp4)" in said[0] and "data.jsonl:0" not in said[0]
    last = find_last_checkpoint(tmp_path / "run")
    assert (last is None) == (step == 1)
    if last:
        assert f"the last checkpoint is {last}." in said[0] and last.name == f"checkpoint-{step - 1}"
        assert all(value.isfinite().all() for value in weights(last).values())


ZERO3 = pytest.param("zero3", marks=[pytest.mark.slow, pytest.mark.needs("deepspeed")])


@pytest.mark.parametrize("deepspeed", [None, ZERO3])
def test_a_loss_that_is_not_finite_can_be_left_out(write_config, tmp_path, with_a_bad_clip, deepspeed):
    config = write_config(
        data=with_a_bad_clip,
        optimization={"on_nan": "skip"},
        training={**STEADY, "max_steps": 5, "gradient_accumulation_steps": 2}
        | ({"deepspeed": f"configs/deepspeed/{deepspeed}.json"} if deepspeed else {}),
    )
    done = run_poisoned(config, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "run"
    skipped = [line for file in sorted(folder.glob("skipped-*")) for line in file.read_text().splitlines()]
    problems = [json.loads(line)["problem"] for line in skipped]
    assert all("left out of step" in problem and "data.jsonl:4 (bad.mp4)" in problem for problem in problems)
    assert any(problem.partition(": left")[0].endswith("data.jsonl:4 (bad.mp4)") for problem in problems)
    assert any("data.jsonl:4" not in problem.partition(": left")[0] for problem in problems)  # the other rank's sample
    logs = history(folder)
    assert sum(entry.get("skipped", 0) for entry in logs) == len(problems)
    assert all(math.isfinite(entry[key]) for entry in logs for key in ("loss", "text_loss", "grad_norm"))
    assert all(value.isfinite().all() for value in weights(folder).values())


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_does_not_reach_the_optimizer(write_config, tmp_path, on_nan):
    from transformers import TrainerCallback

    from swim_fast.training.nonfinite import MOST_IN_A_ROW, NonFiniteError
    from swim_fast.training.run import build_trainer

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            bad = state.global_step == 2 or state.global_step > 4
            self.hook = parameter.register_hook(lambda gradient: gradient * float("nan") if bad else gradient)

        def on_step_end(self, args, state, control, **kwargs):
            self.hook.remove()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            reached.append(all(p.grad is None or p.grad.isfinite().all() for p in kwargs["model"].parameters()))

    data = {"train": [{"path": str(write_records(tmp_path / "train.jsonl", [text_record(n) for n in range(3)]))}]}
    config = write_config(data=data, optimization={"on_nan": on_nan}, training={**STEADY, "max_steps": 30})
    trainer = build_trainer(load_config(config))
    parameter, reached = trainer.model.get_output_embeddings().weight, []
    trainer.add_callback(Poison())
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert all(reached) and all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    if on_nan == "stop":
        assert len(reached) == 2
        assert "step 3: the gradient is not finite" in str(error.value) and "train.jsonl:" in str(error.value)
    else:
        assert len(reached) == 5 + MOST_IN_A_ROW
        assert f"{MOST_IN_A_ROW} batches before it had to be left out as well" in str(error.value)


@pytest.mark.slow
@pytest.mark.needs("deepspeed")
def test_deepspeed_is_not_resumed_by_another_number_of_ranks_unless_converted(write_config, tmp_path):
    config = write_config(training={**STEADY, "max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    zero3 = "training.deepspeed=configs/deepspeed/zero3.json"
    run("train", config, zero3, ranks=2)
    folder = tmp_path / "run"
    uninterrupted = losses(folder)
    shutil.rmtree(folder / "checkpoint-4")
    run("train", config, zero3, "--resume", ranks=2)
    assert losses(folder) == uninterrupted
    shutil.rmtree(folder / "checkpoint-4")
    alone = ["--resume", "training.gradient_accumulation_steps=2"]
    assert "optimizer state can only be read so" in run("train", config, *alone, code=2)
    refused = launch_one("train", str(config), *alone, zero3)
    assert refused.returncode != 0
    said = refused.stderr
    assert "was saved by 2 ranks with DeepSpeed ZeRO-3" in said and "this run has 1 with ZeRO-3" in said
    (convert,) = [line.split() for line in said.splitlines() if "ds_to_universal" in line]
    subprocess.run([sys.executable, *convert[1:]], env=environment(), check=True, capture_output=True)
    settings = json.loads(Path("configs/deepspeed/zero3.json").read_text()) | {"checkpoint": {"load_universal": True}}
    (tmp_path / "universal.json").write_text(json.dumps(settings))
    resumed = launch_one("train", str(config), *alone, f"training.deepspeed={tmp_path}/universal.json")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(folder) == pytest.approx(uninterrupted, rel=1e-4)


def launch_one(*arguments: str) -> subprocess.CompletedProcess:
    """A single rank under the launcher, which DeepSpeed wants."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    words = [*launcher, "-m", "swim_fast.cli", *arguments]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
