"""Train the demo's model with one choice of the mask loss, and measure where its attention lies on held-out clips."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.core import RecordFile, describe_machine, in_new_process

TASK = "what an object does"  # the question of the demo, which figures are not to be compared across
POINTING = 0.9  # accuracy, the steps to which are counted
EVAL_STEPS = 25
HELDOUT_CLIPS = 30


class Choice(NamedTuple):
    """A mask loss, by the names of `attention_loss`."""

    softmax: str
    fusion: str
    prediction: str
    criterion: str
    query_position: str = "noun"

    def __str__(self) -> str:
        return " · ".join(self)


def sensible_choices() -> list[Choice]:
    """Return the paper's choice, all that differ from it in one respect, the released code's and its limit, and
    the KL attention loss (arXiv 2511.12738)."""
    paper = Choice("frame", "mean", "probability", "bce")
    criteria = [paper._replace(criterion=name) for name in ("focal", "iou", "dice", "kl", "mass")]
    fusions = [paper._replace(fusion=name) for name in ("add", "product", "none")]
    softmaxes = [paper._replace(softmax=name) for name in ("visual", "causal")]
    scaled = [paper._replace(prediction="min_max", fusion=name) for name in ("mean", "product", "none")]
    causal = [Choice("causal", "product", "min_max", name) for name in ("bce", "kl")]
    released = Choice("full", "product", "released", "bce", "predictor")
    others = [Choice("visual", "none", "probability", "klal")]
    return [paper, *criteria, *fusions, *softmaxes, *scaled, *causal, *others, released]


@dataclass(frozen=True)
class Record:
    """A row of the CSV: one training run. Metrics are those of `swim-fast evaluate grounding` on held-out clips."""

    softmax: str
    fusion: str
    prediction: str
    criterion: str
    query_position: str
    task: str
    seed: int
    steps: int
    steps_to_pointing: int | None  # of `POINTING`; None: not within the steps
    pointing_accuracy: float
    mass_in_mask: float
    soft_iou: float
    gamepoint_top_1pct: float
    gamepoint_top_10pct: float
    average_precision: float
    text_loss: float
    cpu: str = ""
    threads: int = 0
    torch: str = ""
    python: str = ""

    @property
    def choice(self) -> Choice:
        return Choice(*astuple(self)[: len(Choice._fields)])


def open_records(path: Path) -> RecordFile[Record]:
    return RecordFile(path, Record, *Choice._fields, "task", "seed", "steps")


def measure_all(choices: Iterable[Choice], seeds: int, steps: int, clips: int, workers: int, path: Path) -> None:
    """Measure what the CSV does not hold yet, a few runs at a time, each in a process with one thread.

    Every record is written at once.
    """
    file, folder = open_records(path), path.parent / "bake_off_runs"
    wanted = [
        job for job in itertools.product(range(seeds), choices) if (*job[1], TASK, job[0], steps) not in file.records
    ]
    with ThreadPoolExecutor(workers) as pool:
        for seed in sorted({seed for seed, _ in wanted}):
            in_new_process(prepare, folder / str(seed), seed, clips)
        running = {
            pool.submit(in_new_process, run, choice, folder / str(seed), seed, steps): choice for seed, choice in wanted
        }
        for count, done in enumerate(as_completed(running), start=1):
            record = done.result()
            file.put(record)
            print(f"{count} of {len(wanted)}: {running[done]}: {record.pointing_accuracy:.3f}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def prepare(folder: Path, seed: int, clips: int) -> None:
    """Render the demo's clips and make its model."""
    from swim_fast.demo.clips import write_demo_data
    from swim_fast.demo.texts import all_texts
    from swim_fast.demo.tiny_model import build_checkpoint

    if (folder / "start").is_dir():  # by a run that was ended
        return
    write_demo_data(folder / "data", seed=seed, train_clips=clips, heldout_clips=HELDOUT_CLIPS, progress=False)
    build_checkpoint(str(folder / "start"), all_texts(), seed=seed)


def run(choice: Choice, folder: Path, seed: int, steps: int) -> Record:
    """Train with one choice, as the demo does but for the number of steps, and measure; unless the folder holds it."""
    output = folder / "-".join(choice)
    if not (output / "out" / "results.json").is_file():
        train_and_evaluate(choice, folder, output, seed, steps)
    results = json.loads((output / "out" / "results.json").read_text())
    metrics = json.loads((output / "all_results.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    reached = [log["step"] for log in history if log.get("eval_heldout_pointing_accuracy", 0) >= POINTING]
    names = ("gamepoint_top_1pct", "gamepoint_top_10pct", "average_precision")
    return Record(
        **choice._asdict(),
        task=TASK,
        seed=seed,
        steps=steps,
        steps_to_pointing=min(reached, default=None),
        **{name: round(value, 4) for name, value in results["fused"].items()},
        **{name: round(results["ranking"]["fused"][name], 4) for name in names},
        text_loss=round(metrics["eval_heldout_text_loss"], 4),
        **describe_machine(),
    )


def train_and_evaluate(choice: Choice, folder: Path, output: Path, seed: int, steps: int) -> None:
    """Train and evaluate in the folder of one run."""
    import torch

    from swim_fast.cli import main
    from swim_fast.config import load_config
    from swim_fast.training.run import train

    torch.set_num_threads(1)
    shutil.rmtree(output, ignore_errors=True)
    heldout = folder / "data" / "heldout.jsonl"
    values = {f"attention_loss.{name}": value for name, value in choice._asdict().items()}
    values |= {
        "model.path": folder / "start",
        "data.train": f"[{{path: {folder / 'data' / 'train.jsonl'}}}]",
        "data.eval": f"{{heldout: {{path: {heldout}}}}}",
        "training.output_dir": output,
        "training.use_cpu": "true",
        "training.max_steps": steps,
        "training.eval_steps": EVAL_STEPS,
        "training.save_strategy": "no",
        "training.seed": seed,
        "training.report_to": "none",
        "training.disable_tqdm": "true",
        "training.dataloader_persistent_workers": "true",
    }
    train(load_config("demo", [f"{key}={value}" for key, value in values.items()]))
    words = ["evaluate", "grounding", output, heldout, "--out", output / "out", "--layers", "supervised"]
    words += ["--device", "cpu"]
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        if main([str(word) for word in words]):
            raise RuntimeError(f"{choice}: evaluation failed")
