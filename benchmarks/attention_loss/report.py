"""Table, picture and targets of the attention loss benchmark, drawn from its CSV.

python -m benchmarks.attention_loss.report     # draws attention_loss.md and .png again from attention_loss.csv
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.attention_loss.cases import Geometry
from benchmarks.attention_loss.measure import ATTENTION, LOSS_OURS, LOSS_PLAIN, Record

HERE = Path(__file__).parent
NAME = "attention_loss"
OURS, PUBLISHED = "this project", "all text rows"
COLORS = {OURS: "#0072B2", "gathered rows": "#B8860B", PUBLISHED: "#D55E00"}
AT = (16384, 8)  # tokens and rows of the targets
GEOMETRY = Geometry()


def write(records: Sequence[Record], folder: Path) -> None:
    """Puts records into the CSV, in the place of those of the same length, rows and method."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.csv"
    kept = {(r.length, r.rows, r.method): r for r in (*(read(path) if path.exists() else ()), *records)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key].row() for key in sorted(kept))


def draw(folder: Path) -> None:
    """Table and picture from the CSV."""
    records = read(folder / f"{NAME}.csv")
    (folder / f"{NAME}.md").write_text(draw_text(records), encoding="utf-8")
    draw_picture(records, folder / f"{NAME}.png")


def read(path: Path) -> list[Record]:
    with path.open(newline="") as file:
        return [Record.parse(row) for row in csv.DictReader(file)]


class Figures:
    """Records by length, rows and method."""

    def __init__(self, records: Iterable[Record]):
        self._records = {(record.length, record.rows, record.method): record for record in records}
        self.lengths = sorted({length for length, *_ in self._records})
        self.rows = sorted({rows for _, rows, method in self._records if method in COLORS})

    def get(self, length: int, rows: int, method: str) -> Record | None:
        return self._records.get((length, rows, method))

    def attention(self, length: int) -> float | None:
        """Seconds of the flash attention of the supervised layers, forward and backward."""
        record = self.get(length, 0, ATTENTION)
        return None if record is None else GEOMETRY.supervised * record.seconds

    def line(self, rows: int, method: str) -> list[Record]:
        """Over the lengths."""
        found = (self.get(length, rows, method) for length in self.lengths)
        return [record for record in found if record is not None]


@dataclass(frozen=True)
class Target:
    """A ratio and what it should be at most."""

    what: str
    ratio: float
    most: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.most

    def row(self) -> str:
        met = "met" if self.met else "**not met**"
        return f"| {self.what} | at most {_ratio(self.most)} | {_ratio(self.ratio)} | {met} |"


def targets(figures: Figures) -> list[Target]:
    """Those whose figures are there."""
    found = []
    length, rows = AT
    ours, published, attention = figures.get(*AT, OURS), figures.get(*AT, PUBLISHED), figures.attention(length)
    if ours and published:
        attentions = GEOMETRY.num_layers * GEOMETRY.num_heads * GEOMETRY.text * length * 2
        found += [
            Target("saved by autograd, of all text rows", ours.saved_bytes / published.saved_bytes, 1 / 500),
            Target("the same, of the bf16 attentions of all text rows", ours.saved_bytes / attentions, 1 / 500),
            Target("peak, of all text rows", ours.peak_bytes / published.peak_bytes, 1 / 50),
            Target("time, of all text rows", ours.seconds / published.seconds, 1 / 100),
        ]
    if ours and attention:
        found.append(Target("time, of the flash attention of six layers", ours.seconds / attention, 1 / 20))
    for rows in figures.rows:
        short, long = figures.get(length, rows, OURS), figures.get(2 * length, rows, OURS)
        if short and long:
            what = f"linear growth: {2 * length:,} over {length:,} tokens, {rows} rows: "
            found.append(Target(what + "time", long.seconds / short.seconds, 2.6))
            found.append(Target(what + "peak", long.peak_bytes / short.peak_bytes, 2.6))
    ours, plain = figures.get(*AT, LOSS_OURS), figures.get(*AT, LOSS_PLAIN)
    if ours and plain:
        found.append(Target("mask loss alone: peak, of a plain one", ours.peak_bytes / plain.peak_bytes, 1 / 20))
        found.append(Target("mask loss alone: time, of a plain one", ours.seconds / plain.seconds, 1 / 3))
    return found


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"1/{1 / value:,.0f}"


def draw_text(records: Sequence[Record]) -> str:
    figures = Figures(records)
    said = _INTRODUCTION.format(frames=2 * GEOMETRY.patches, **asdict(GEOMETRY))
    lines = [said, *_conditions(records), *_table(figures), *_targets(figures), *_alone(figures)]
    return "\n".join([*lines, ""])


_INTRODUCTION = """# Attention loss: what it costs beside flash attention

Written by `make bench`, on a CPU; no figure here is one of a GPU.

One training step of a model of {num_layers} layers with {num_heads} query and {num_key_heads} key heads of size
{head_dim}: {frames} frames make {patches} temporal patches, all supervised; {text} text tokens follow, the nouns
("rows") among them. Forward and backward of the noun maps of {supervised} layers and of the mask loss, with one
mask of {mask_size[0]} x {mask_size[1]} for each patch and object, {rows_per_object} rows an object.

- **this project**: `flash_noun_attention` (output and maps from one node) and `mask_alignment_loss`.
- **gathered rows**: beside the attention, the nouns' rows gathered from the query, their scores against all keys
  before them, softmax in fp32, head mean, all by autograd; the mask loss in plain operations, pair by pair.
- **all text rows**: as the method was published, written anew from its description. At all layers the softmax of
  all text queries, with repeated key heads, in fp32, returned in bf16; product of {supervised} layers, the nouns
  picked out at the end; the mask loss in plain operations, pair by pair, with the paper's numerics.

Figures are *extra*, above plain flash attention. The attention of one layer is timed by itself, forward and
backward. Its output, lse and gradients are kept and handed out again where a method runs it, so that what is timed
and counted is what the method adds; the difference of two long runs would be noise. All layers have the same query,
key and value. What is made once per batch, such as the plan of the rows and masks, is made in every run.

- *time*: median of the rounds (`rounds` in the CSV). Where there is one round, time and memory are of the same run,
  and counting has added 1 to 3 % to the time.
- *peak*: the most that torch's CPU allocator held at any time of forward and backward; every allocation counts.
- *kept*: what it held between forward and backward.
- *saved*: what autograd saved, by storage, without the inputs and the attention's own results.
- *layers*: how many were measured, of how many. Layers left out are forwards only and all alike: for each, the time
  of such a forward and the bytes it keeps are added. The CSV has the measured figures as well.

Nothing is measured unless the methods agree first, in maps, loss and gradients, in float64, fp32 and bf16
(`attention_loss_agreement.py`)."""


def _conditions(records: Sequence[Record]) -> list[str]:
    kinds = sorted({(record.cpu, record.threads, record.dtype, record.torch, record.python) for record in records})
    return ["", *("{}, {} threads; {}; torch {}, Python {}.".format(*kind) for kind in kinds)]


def _table(figures: Figures) -> list[str]:
    columns = "tokens grid rows method time of~attention peak kept saved largest~saved layers".replace(" ", " | ")
    lines = ["", f"| {columns.replace('~', ' ')} |", "|---:|---|---:|---|---:|---:|---:|---:|---:|---|---|"]
    for length in figures.lengths:
        attention = figures.attention(length)
        if attention is not None:
            layers = f"1 of {GEOMETRY.supervised}"
            lines.append(f"| {length:,} | | | flash attention | {_seconds(attention)} | | | | | | {layers} |")
        for rows in figures.rows:
            for method in COLORS:
                record = figures.get(length, rows, method)
                if record is not None:
                    lines.append(_row(record, attention))
    missing = [
        f"{method} with {rows} rows at {length:,} tokens"
        for method in COLORS
        for rows in figures.rows
        for length in figures.lengths
        if figures.get(length, rows, method) is None
    ]
    if missing:
        lines += ["", f"Not measured, because it does not fit into this machine's memory: {'; '.join(missing)}."]
    return lines


def _row(record: Record, attention: float | None) -> str:
    share = "" if attention is None else f"{record.seconds / attention:.1%}"
    sizes = [_size(size) for size in (record.peak_bytes, record.kept_bytes, record.saved_bytes)]
    layers = f"{record.layers_measured} of {record.layers}"
    cells = [f"{record.length:,}", record.grid, record.rows, record.method, _seconds(record.seconds), share]
    return f"| {' | '.join(map(str, [*cells, *sizes, record.largest_saved, layers]))} |"


def _targets(figures: Figures) -> list[str]:
    length, rows = AT
    lines = ["", f"## Targets of this project, at {length:,} tokens and {rows} rows", ""]
    found = targets(figures)
    if not found:
        return [*lines, "Not measured in this run."]
    lines += ["| | wanted | measured | |", "|---|---|---|---|", *(target.row() for target in found)]
    large = [record for rows in figures.rows for record in figures.line(rows, OURS) if record.full_size_saved]
    shapes = "; ".join(f"{record.full_size_saved} at {record.length:,}" for record in large) or "none"
    met = "**not met**" if large else "met"
    lines.append(f"| saved tensors of Hq x R x video or Hq x L x D, at any length | none | {shapes} | {met} |")
    return lines


def _alone(figures: Figures) -> list[str]:
    records = [figures.get(*AT, method) for method in (LOSS_OURS, LOSS_PLAIN)]
    if None in records:
        return []
    length, rows = AT
    lines = ["", f"## The mask loss alone, {rows} rows x {GEOMETRY.patches} patches of {records[0].grid}", ""]
    lines += ["| | time | peak | kept | saved | largest saved |", "|---|---:|---:|---:|---:|---|"]
    for record in records:
        sizes = " | ".join(_size(size) for size in (record.peak_bytes, record.kept_bytes, record.saved_bytes))
        lines.append(f"| {record.method} | {_seconds(record.seconds)} | {sizes} | {record.largest_saved} |")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def _size(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.1f} MB" if value < 100e6 else f"{value / 1e6:,.0f} MB"


def draw_picture(records: Sequence[Record], path: Path) -> None:
    """Extra time and extra peak memory over the length, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = Figures(records)
    figure, (times, peaks) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    yardstick = [(length, seconds) for length in figures.lengths if (seconds := figures.attention(length))]
    _lines(times, figures, lambda record: record.seconds, yardstick)
    _lines(peaks, figures, lambda record: record.peak_bytes / 2**20)
    times.set_title("extra time, seconds", loc="left", fontsize=10)
    peaks.set_title("extra peak memory, MiB", loc="left", fontsize=10)
    styles = ", ".join(f"{name} {rows} rows" for name, rows in zip(("solid", "dashed"), figures.rows, strict=False))
    threads = f"{records[0].cpu}, {records[0].threads} threads, {records[0].dtype}"
    figure.suptitle(f"Attention loss, forward and backward, above flash attention: {threads}; {styles}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(axes, figures: Figures, figure_of, yardstick: Sequence[tuple[int, float]] = ()) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    labels = []  # y of the last point, text, colour
    for method, color in COLORS.items():
        for rows, style in zip(figures.rows, ("-", "--", ":"), strict=False):
            points = [(record.length, figure_of(record)) for record in figures.line(rows, method)]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=4)
                x, y = points[-1]
                if x == figures.lengths[-1]:
                    labels.append((y, f"{method}, {rows}", color))
                else:  # the longer ones do not fit into memory
                    where = {"textcoords": "offset points", "ha": "left", "fontsize": 8}
                    axes.annotate(f"{method}, {rows}", (x, y), (0, 7), color=color, **where)
    if yardstick:
        axes.plot(*zip(*yardstick, strict=True), color="0.5", linewidth=1, marker=".")
        labels.append((yardstick[-1][1], f"flash attention, {GEOMETRY.supervised} layers", "0.4"))
    axes.set_xlabel("tokens")
    axes.set_xticks(figures.lengths, [f"{length // 1024} k" for length in figures.lengths])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="0.92")
    _label(axes, max(figures.lengths), sorted(labels))


def _label(axes, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """At the lines' ends, from below, each far enough above the one before to be read."""
    lowest = -math.inf
    for y, text, color in labels:
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        lowest = max(height, lowest + 0.045)
        offset = (lowest - height) * axes.bbox.height * 72 / axes.figure.dpi
        axes.annotate(text, (x, y), (6, offset), textcoords="offset points", color=color, va="center", fontsize=8)


if __name__ == "__main__":
    draw(HERE)
