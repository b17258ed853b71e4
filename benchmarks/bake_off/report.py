"""Table of the bake-off, drawn from its CSV."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.bake_off.measure import (
    EVAL_STEPS,
    HELDOUT_CLIPS,
    POINTING,
    Choice,
    Record,
    open_records,
    sensible_choices,
)
from benchmarks.core import markdown_table

HERE = Path(__file__).parent
CSV, REPORT = "bake_off.csv", "bake_off.md"
METRICS = {
    "pointing_accuracy": "pointing",
    "mass_in_mask": "mass",
    "soft_iou": "IoU",
    "gamepoint_top_1pct": "GamePoint@1 %",
    "gamepoint_top_10pct": "@10 %",
    "average_precision": "AP",
    "text_loss": "text loss",
}

_INTRODUCTION = """# Choices of the mask loss on the demo

Written by `python -m benchmarks.bake_off`, on a CPU: the demo's tiny model, from random weights, {steps} steps each.
A table for each question that the demo has asked; the first ones, for shade, size and motion, had four layers, three of
them supervised, and a mask weight of 1.
Mean over the seeds ± half of their range, on {clips} held-out clips, each run under its own softmax and fusion.
*Steps to {pointing}*: the first evaluation, of one every {every} steps, with that pointing accuracy; `>` if some seed
never had it. The first row is the paper's choice, which is the default. The command measures what is missing of the
{choices} choices with the present question.

A tiny model on rendered clips says which choices learn, and how fast. It says nothing of a model of 7 B parameters."""


def draw(folder: Path) -> str:
    """Write the table from the CSV; return it."""
    text = draw_text(open_records(folder / CSV).records.values())
    (folder / REPORT).write_text(text, encoding="utf-8")
    return text


def draw_text(records: Iterable[Record]) -> str:
    records = list(records)
    sizes = {"steps": records[0].steps, "clips": HELDOUT_CLIPS, "pointing": POINTING, "every": EVAL_STEPS}
    text = _INTRODUCTION.format(**sizes, choices=len(sensible_choices()))
    machines = {f"{record.cpu}, one thread a run; torch {record.torch}, Python {record.python}." for record in records}
    header = ("seeds", "softmax", "fusion", "prediction", "criterion", f"steps to {POINTING}", *METRICS.values())
    lines = [text, "", *sorted(machines), ""]
    for task in dict.fromkeys(record.task for record in records):
        by_choice: dict[Choice, list[Record]] = {}
        for record in records:
            if record.task == task:
                by_choice.setdefault(record.choice, []).append(record)
        table = markdown_table(header, "rllll" + "r" * (1 + len(METRICS)), [_row(*item) for item in by_choice.items()])
        lines += [f"## Asked for {task}", "", *table, ""]
    return "\n".join(lines)


def _row(choice: Choice, records: Sequence[Record]) -> tuple[str, ...]:
    prediction = choice.prediction
    if choice.criterion in ("kl", "mass"):
        prediction = "(any)"  # they compare f over its sum
    if choice.query_position != "noun":
        prediction += f", {choice.query_position}"
    reached = [record.steps_to_pointing for record in records]
    steps = f"{statistics.mean(reached):.0f}" if None not in reached else f"> {records[0].steps}"
    values = (_format([getattr(record, name) for record in records]) for name in METRICS)
    return str(len(records)), choice.softmax, choice.fusion, prediction, choice.criterion, steps, *values


def _format(values: Sequence[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
