"""Tables and targets of the benchmark of training, drawn from its CSV.

python -m benchmarks.training.report     # draws training.md again from training.csv
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.core import read_cpu_model
from benchmarks.training.input import BATCH, PACK_TOKENS, RANKS, WORKERS, Collation, Loading, Padding
from benchmarks.training.steps import DTYPES, Steps

HERE = Path(__file__).parent
NAME = "training"
OVERHEAD, ROOM, SHARE, COLLATION = 0.03, 1.05, 0.8, 0.010  # the targets


@dataclass(frozen=True)
class Record:
    """A row of the CSV: one figure. `value` is the median of the rounds, `lowest` and `highest` their extremes."""

    part: str  # step, padding, loading, collation
    case: str
    measure: str
    value: float
    unit: str
    lowest: float
    highest: float
    rounds: int
    about: str  # what it was measured on
    threads: int
    cpu: str
    torch: str
    python: str

    @classmethod
    def parse(cls, row: dict[str, str]) -> Record:
        """From a row of the file."""
        kinds = {"float": float, "int": int, "str": str}
        return cls(**{field.name: kinds[field.type](row[field.name]) for field in fields(cls)})


def record(part: str, case: str, measure: str, values: Sequence[float], unit: str, about: str, threads: int = 0):
    """A record of all rounds' values, measured here."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    where = {"cpu": read_cpu_model(), "torch": torch.__version__, "python": platform.python_version()}
    where["threads"] = threads or torch.get_num_threads()
    return Record(part, case, measure, median, unit, ordered[0], ordered[-1], len(ordered), about, **where)


def step_records(size: str, steps: Steps) -> list[Record]:
    ranks = f"{steps.ranks} rank{'s' * (steps.ranks > 1)}"
    case = f"{size}, {ranks}"
    about = (
        f"{steps.parameters / 1e6:.1f} M parameters, {DTYPES[size]}, {steps.tokens:,} tokens and {steps.rows} noun "
        f"tokens a rank, {steps.pairs} pairs"
    )
    return [
        record("step", case, "with the attention loss", steps.with_loss, "s", about, steps.threads),
        record("step", case, "without", steps.without, "s", about, steps.threads),
    ]


def padding_records(padding: Padding) -> list[Record]:
    about = f"{padding.samples} samples of {padding.shortest:,} to {padding.longest:,} tokens"
    batches = f"{about}, {padding.padded_batches} batches of {BATCH}"
    packs = f"{about}, {padding.packed_batches} batches of up to {PACK_TOKENS:,} tokens"
    return [
        record("padding", "padded", "places per token", [padding.padded], "", batches),
        record("padding", "packed", "places per token", [padding.packed], "", packs),
        record("padding", "packed, room", "places per token", [padding.room], "", f"{packs}, dealt to {RANKS} ranks"),
    ]


def loading_records(loading: Loading) -> list[Record]:
    about = f"{loading.samples} samples, {loading.frames} frames, {WORKERS} workers"
    both = {"everything": loading.everything, "decoding alone": loading.decoding}
    rates = {name: [loading.samples / value for value in seconds] for name, seconds in both.items()}
    return [record("loading", loading.name, name, values, "samples/s", about) for name, values in rates.items()]


def collation_records(collation: Collation) -> list[Record]:
    about = f"{collation.tokens:,} tokens, {collation.pairs} pairs"
    measures = {"padded": "collation, padded", "packed": "collation, packed", "processor": "the processor"}
    measures["building"] = "decoding, processor, nouns and masks"
    values = asdict(collation)
    return [record("collation", "one sample", text, values[key], "s", about) for key, text in measures.items()]


def write(records: Sequence[Record], folder: Path) -> None:
    """Puts records into the CSV, in the place of those of the same part, case and measure."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.csv"
    kept = {(r.part, r.case, r.measure): r for r in (*(read(path) if path.exists() else ()), *records)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(found) for found in kept.values())


def read(path: Path) -> list[Record]:
    with path.open(newline="", encoding="utf-8") as file:
        return [Record.parse(row) for row in csv.DictReader(file)]


def draw(folder: Path) -> None:
    """The report from the CSV."""
    text = draw_text(read(folder / f"{NAME}.csv"))
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")


class Figures:
    """Records by part, case and measure."""

    def __init__(self, records: Sequence[Record]):
        self._records = {(r.part, r.case, r.measure): r for r in records}

    def cases(self, part: str) -> list[str]:
        return list(dict.fromkeys(case for p, case, _ in self._records if p == part))

    def get(self, part: str, case: str, measure: str) -> Record:
        return self._records[part, case, measure]

    def all(self, part: str) -> list[Record]:
        return [r for (p, *_), r in self._records.items() if p == part]


@dataclass(frozen=True)
class Target:
    """A figure, and what it should be at most (or at least)."""

    what: str
    value: float
    wanted: float
    form: str = "{:.2f}"
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.wanted if self.least else self.value <= self.wanted

    def row(self) -> str:
        wanted = f"{'at least' if self.least else 'at most'} {self.form.format(self.wanted)}"
        met = "met" if self.met else "**not met**"
        return f"| {self.what} | {wanted} | {self.form.format(self.value)} | {met} |"


def overhead(figures: Figures, case: str) -> float:
    """Of the attention loss, of the step without it."""
    with_loss, without = (figures.get("step", case, name).value for name in ("with the attention loss", "without"))
    return with_loss / without - 1


def targets(figures: Figures) -> list[Target]:
    """Those whose figures are there."""
    found = []
    for case in figures.cases("step"):
        found.append(Target(f"attention loss, of a step: {case}", overhead(figures, case), OVERHEAD, "{:.1%}"))
    for case in figures.cases("padding"):
        if case != "padded":
            value = figures.get("padding", case, "places per token").value
            found.append(Target(f"places per token: {case}", value, ROOM))
    for case in figures.cases("loading"):
        rates = (figures.get("loading", case, name).value for name in ("everything", "decoding alone"))
        share = next(rates) / next(rates)
        found.append(Target(f"loader, of decoding alone: {case}", share, SHARE, least=True))
    for found_record in figures.all("collation"):
        if found_record.measure.startswith("collation"):
            value = 1e3 * found_record.value
            found.append(Target(f"{found_record.measure}: {found_record.about}", value, 1e3 * COLLATION, "{:.1f} ms"))
    return found


_INTRODUCTION = f"""# Training: what the attention loss and the input cost

Written by `make bench-train`, on a CPU; no figure here is one of a GPU.

- **Step**: the time between the callbacks at a training step's beginning and end, of the real trainer: forward,
  backward, reduction over the ranks (gloo), clipping, AdamW. Every step trains on the same clip. Steps with the
  attention loss and steps without it, in which the same model runs as a stock one, alternate in one run (with, without,
  without, with). Before it the text loss of both is compared, and the mask loss with the eager reference's; nothing is
  timed unless they agree. The vision tower is frozen; attention is torch's. With two ranks each has half of the cores.
  A tiny model has little else to do: its share of the attention loss is above that of a real one.
- **Padding**: places in the batches of an epoch over a mixture of clips and texts, for each useful token; of packed
  batches also the room that they have, which counts what they leave empty. Predicted lengths are compared with those of
  collated batches.
- **Loading**: samples per second of the loader with {WORKERS} workers, collated, against a loader that decodes the same
  frames of the same clips by the same library and does nothing else. Passes alternate; the first does not count.
- **Collation**: of one long sample, beside the time that it takes to be made.

Figures are medians; the CSV has the extremes."""


def draw_text(records: Sequence[Record]) -> str:
    figures = Figures(records)
    kinds = sorted({(r.cpu, r.torch, r.python) for r in records})
    lines = [_INTRODUCTION, "", *("{}; torch {}, Python {}.".format(*kind) for kind in kinds)]
    lines += ["", "## Targets of this project", "", "| | wanted | measured | |", "|---|---|---:|---|"]
    lines += [target.row() for target in targets(figures)]
    if figures.cases("step"):
        lines += _steps(figures)
    for part, title in (("padding", "Padding"), ("loading", "Loading"), ("collation", "Collation")):
        if figures.cases(part):
            lines += ["", f"## {title}", "", "| | | | |", "|---|---|---:|---|"]
            lines += [f"| {r.case} | {r.measure} | {_value(r)} | {r.about} |" for r in figures.all(part)]
    return "\n".join([*lines, ""])


def _steps(figures: Figures) -> list[str]:
    lines = ["", "## Step", "", "| model | with | without | more | lowest to highest with | without | threads | |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
    for case in figures.cases("step"):
        a, b = (figures.get("step", case, name) for name in ("with the attention loss", "without"))
        spans = " | ".join(f"{r.lowest:.2f} to {r.highest:.2f} s" for r in (a, b))
        about = f"{a.about}; {a.rounds} rounds"
        more = f"{overhead(figures, case):.1%}"
        lines.append(f"| {case} | {a.value:.3f} s | {b.value:.3f} s | {more} | {spans} | {a.threads} | {about} |")
    return lines


def _value(found: Record) -> str:
    if found.unit == "s":
        return f"{1e3 * found.value:,.1f} ms"
    return f"{found.value:.3f} {found.unit}".rstrip()


if __name__ == "__main__":
    draw(HERE)
