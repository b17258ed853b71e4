"""Building blocks of every benchmark's report: records in a CSV file, Markdown tables, targets, plots, the machine.

A report is drawn from its CSV file alone, so it can be drawn again without measuring.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import platform
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

import torch

from swim_fast.files import atomic_write

Record = TypeVar("Record")


class RecordFile(Generic[Record]):
    """A CSV file of dataclass records, one row for each key.

    Attributes:
        path: the file; it need not exist.
        records: the rows by key, in the file's order.

    Args:
        kind: the dataclass. Its fields are the columns: `str`, `int`, `float`, or one of them or None (an empty cell).
        key: fields that tell records apart.
    """

    def __init__(self, path: Path, kind: type[Record], *key: str):
        self.path, self.kind, self.key = path, kind, key
        self.records: dict[tuple, Record] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                parsers = {name: _parser(hint) for name, hint in typing.get_type_hints(kind).items()}
                for row in csv.DictReader(file):
                    self._add(kind(**{name: parse(row[name]) for name, parse in parsers.items()}))

    def put(self, *records: Record) -> None:
        """Write records at once, each in place of the one with its key, so that a killed run loses nothing."""
        for record in records:
            self._add(record)
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, [field.name for field in fields(self.kind)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, self.records.values()))

    def _add(self, record: Record) -> None:
        self.records[tuple(getattr(record, name) for name in self.key)] = record


def _parser(hint: type | types.UnionType) -> Callable[[str], object]:
    if not isinstance(hint, types.UnionType):
        return hint
    kind = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return lambda text: kind(text) if text else None


def markdown_table(header: Sequence[str], align: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table; `align` has `l` or `r` for each column, None is an empty cell."""
    ruler = ["---:" if side == "r" else "---" for side in align]
    cells = [header, *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    first, *rest = (f"| {' | '.join(row)} |" for row in cells)
    return [first, f"|{'|'.join(ruler)}|", *rest]


def format_ratio(value: float) -> str:
    """Return `0.33`, or `1/500` for what is below a tenth."""
    return f"{value:.2f}" if value >= 0.1 else f"1/{1 / value:,.0f}"


@dataclass(frozen=True)
class Target:
    """A measured value and its bound: an upper one, or with `at_least` a lower one."""

    name: str
    value: float
    bound: float
    form: Callable[[float], str] = format_ratio
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def targets_table(targets: Iterable[Target], *more: Sequence[str]) -> list[str]:
    """Return the lines of a table of targets, `more` rows at its end."""
    rows = [
        (
            target.name,
            f"{'at least' if target.at_least else 'at most'} {target.form(target.bound)}",
            target.form(target.value),
            verdict(target.met),
        )
        for target in targets
    ]
    return markdown_table(("target", "wanted", "measured", ""), "llrl", [*rows, *more])


def verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def in_new_process(function: Callable, *arguments):
    """Return what a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def describe_machine() -> dict[str, object]:
    """Return the columns that say where a record was measured, which must have been the CPU.

    Raises:
        RuntimeError: this process has used a GPU.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("this process has used a GPU, and its figures would be recorded as those of the CPU")
    return {
        "cpu": read_cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@dataclass(frozen=True)
class Line:
    """Points of one series of a plot, labelled at its last one."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    style: str = "-"


def plot_log_log(axes, title: str, lines: Sequence[Line], ticks: dict[int, str]) -> None:
    """Draw lines over a power of two; labels stand right of the last tick, or above a line that ends before it."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=10)
    ends = []
    for line in lines:
        axes.plot(*zip(*line.points, strict=True), line.style, color=line.color, marker="o", markersize=4)
        x, y = line.points[-1]
        if x == max(ticks):
            ends.append((y, x, line))
        else:
            offset = {"textcoords": "offset points", "ha": "left", "fontsize": 8}
            axes.annotate(line.label, (x, y), (0, 7), color=line.color, **offset)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="0.92")
    lowest = -math.inf
    for y, x, line in sorted(ends, key=lambda end: end[:2]):  # from below, each far enough above the one before
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        lowest = max(height, lowest + 0.045)
        offset = (6, (lowest - height) * axes.bbox.height * 72 / axes.figure.dpi)
        label = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(line.label, (x, y), offset, color=line.color, **label)
