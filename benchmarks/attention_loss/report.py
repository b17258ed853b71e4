"""Table, targets and picture of the attention loss benchmark, drawn from its CSV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks.attention_loss.inputs import AT, Geometry
from benchmarks.attention_loss.measure import ATTENTION, Record, open_records
from benchmarks.attention_loss.methods import (
    CAUSAL,
    GATHERED,
    LOSS_OURS,
    LOSS_PLAIN,
    METHODS,
    OURS,
    PUBLISHED,
    RECOMPUTED,
)
from benchmarks.core import Line, Target, markdown_table, plot_log_log, targets_table, verdict

HERE = Path(__file__).parent
CSV, REPORT, PICTURE = "attention_loss.csv", "attention_loss.md", "attention_loss.png"
GEOMETRY = Geometry()
COLORS = {OURS: "#0072B2", CAUSAL: "#56B4E9", GATHERED: "#B8860B", RECOMPUTED: "#CC79A7", PUBLISHED: "#D55E00"}

BOUNDS = {
    f"saved by autograd, of {PUBLISHED}": 1 / 500,
    f"peak, of {PUBLISHED}": 1 / 1000,
    f"time, of {PUBLISHED}": 1 / 100,
    f"peak, of {RECOMPUTED}": 1 / 20,
    f"time, of {RECOMPUTED}": 1 / 5,
    "time, of the flash attention of six layers": 1 / 100,
    "mask loss alone: peak, of a plain one": 1 / 20,
    "mask loss alone: time, of a plain one": 1 / 3,
}
GROWTH = 2.6  # at most, from a length to twice the length


def draw(folder: Path) -> None:
    """Write table and picture from the CSV."""
    records = open_records(folder / CSV).records.values()
    (folder / REPORT).write_text(draw_text(records), encoding="utf-8")
    draw_picture(records, folder / PICTURE)


class Figures:
    """Records by length, rows and method."""

    def __init__(self, records: Iterable[Record]):
        self._records = {(record.length, record.rows, record.method): record for record in records}
        self.lengths = sorted({length for length, _, method in self._records if method in (ATTENTION, *METHODS)})
        self.rows = sorted({rows for _, rows, method in self._records if method in METHODS})

    def get(self, length: int, rows: int, method: str) -> Record | None:
        return self._records.get((length, rows, method))

    def attention(self, length: int) -> float | None:
        """Return the seconds of the flash attention of the supervised layers, forward and backward."""
        record = self.get(length, 0, ATTENTION)
        return None if record is None else GEOMETRY.supervised * record.seconds

    def line(self, rows: int, method: str) -> list[Record]:
        """Return the records of a method over the lengths."""
        found = (self.get(length, rows, method) for length in self.lengths)
        return [record for record in found if record is not None]

    def ratios(self, length: int, rows: int) -> dict[str, float | None]:
        """Return the cost of swim_fast over that of every alternative; None where the alternative was not measured."""
        found: dict[str, float | None] = {}
        ours, loss = (self.get(length, rows, method) for method in (OURS, LOSS_OURS))
        if ours:
            for method in (PUBLISHED, RECOMPUTED, GATHERED):
                theirs = self.get(length, rows, method)
                found[f"saved by autograd, of {method}"] = theirs and ours.saved_bytes / theirs.saved_bytes
                found[f"peak, of {method}"] = theirs and ours.peak_bytes / theirs.peak_bytes
                found[f"time, of {method}"] = theirs and ours.seconds / theirs.seconds
            attention = self.attention(length)
            found["time, of the flash attention of six layers"] = attention and ours.seconds / attention
        if loss:
            plain = self.get(length, rows, LOSS_PLAIN)
            found["mask loss alone: peak, of a plain one"] = plain and loss.peak_bytes / plain.peak_bytes
            found["mask loss alone: time, of a plain one"] = plain and loss.seconds / plain.seconds
        return found


def compute_targets(figures: Figures) -> list[Target]:
    """Return the targets whose figures are there."""
    length, rows = AT
    ratios = figures.ratios(*AT)
    found = [Target(name, ratios[name], bound) for name, bound in BOUNDS.items() if ratios.get(name) is not None]
    if ours := figures.get(*AT, OURS):
        attentions = GEOMETRY.num_layers * GEOMETRY.num_heads * GEOMETRY.text * length * 2
        name = f"saved by autograd, of the bf16 attentions of {PUBLISHED}"
        found.append(Target(name, ours.saved_bytes / attentions, 1 / 500))
    for rows in figures.rows:
        short, long = figures.get(length, rows, OURS), figures.get(2 * length, rows, OURS)
        if short and long:
            name = f"linear growth: {2 * length:,} over {length:,} tokens, {rows} rows: "
            found.append(Target(name + "time", long.seconds / short.seconds, GROWTH))
            found.append(Target(name + "peak", long.peak_bytes / short.peak_bytes, GROWTH))
    return found


def draw_text(records: Iterable[Record]) -> str:
    records = list(records)
    figures = Figures(records)
    text = _INTRODUCTION.format(frames=2 * GEOMETRY.patches, **asdict(GEOMETRY))
    kinds = sorted({(record.cpu, record.threads, record.dtype, record.torch, record.python) for record in records})
    machines = ["{}, {} threads; {}; torch {}, Python {}.".format(*kind) for kind in kinds]
    return "\n".join([text, "", *machines, "", *_table(figures), *_targets(figures), *_mask_loss(figures), ""])


_INTRODUCTION = """# Attention loss: extra cost beside flash attention

Written by `make bench`, on a CPU; no figure here is one of a GPU.

One training step of a model of {num_layers} layers with {num_heads} query and {num_key_heads} key heads of size
{head_dim}: {frames} frames make {patches} temporal patches, all supervised; {text} text tokens follow, the nouns
("rows") among them. Forward and backward of the noun maps of {supervised} layers and of the mask loss, with one
mask of {mask_size[0]} x {mask_size[1]} for each patch and object, {rows_per_object} rows an object.

- **swim_fast**: `flash_noun_attention` (output and maps from one node) and `mask_alignment_loss` with their defaults,
  the paper's equations: a softmax over each patch, mean over layers, the probability itself.
- **swim_fast, causal**: the same ops with the model's own softmax, product over layers and min-max.
- **gathered rows**: beside the attention, the nouns' rows gathered from the query, their scores against the video,
  softmax of each patch in fp32, head mean, all by autograd; the mask loss in plain operations, pair by pair.
- **recomputed q and k**: as GUI-AIMA (arXiv 2511.00810) gets at its maps, written anew from its description. At all
  layers the nouns' query rows and the keys of all tokens made again from the hidden states (projection, rotary
  embedding), key heads repeated, the rows' probabilities of every head kept, all by autograd; then as gathered rows.
- **all text rows**: as SWIM's code was released, written anew from its description. At all layers the softmax of
  all text queries, with repeated key heads, in fp32, returned in bf16; product of {supervised} layers, the nouns
  picked out at the end; the mask loss in plain operations, pair by pair, with the released prediction.

The first, third and fourth compute one loss; the second and the last compute others, on the same nouns and patches.

Figures are *extra*, above plain flash attention. The attention of one layer is timed by itself, forward and
backward. Its output, lse and gradients are kept and handed out again where a method runs it, so that only what the
method adds is timed and counted; the difference of two long runs would be noise. All layers have the same query,
key and value. Whatever is made once per batch, such as the plan of the rows and masks, is made in every run.

- *time*: median of the rounds (`rounds` in the CSV). Where there is one round, time and memory are of the same run,
  and counting has added 1 to 3 % to the time.
- *peak*: most bytes that torch's CPU allocator held at any time of forward and backward; every allocation counts.
- *kept*: bytes that it held between forward and backward.
- *saved*: bytes that autograd saved, by storage, without the inputs and the attention's own results.
- *layers*: measured layers, of all. Layers left out are forwards only and all alike: for each, the time of such a
  forward and the bytes it keeps are added. The CSV has the measured figures as well.

Nothing is measured unless the methods agree first, in maps, loss and gradients, in float64, fp32 and bf16
(`agreement.py`)."""


def _table(figures: Figures) -> list[str]:
    rows, missing = [], []
    for length in figures.lengths:
        if attention := figures.attention(length):
            layers = f"1 of {GEOMETRY.supervised}"
            rows.append((f"{length:,}", None, None, "flash attention", _seconds(attention), *[None] * 5, layers))
        for num_rows in figures.rows:
            for method in METHODS:
                record = figures.get(length, num_rows, method)
                if record is None:
                    if figures.get(length, num_rows, OURS):
                        missing.append(f"{method} with {num_rows} rows at {length:,} tokens")
                    continue
                share = f"{record.seconds / attention:.1%}" if attention else None
                layers = f"{record.layers_measured} of {record.layers}"
                start = (f"{length:,}", record.grid, num_rows, method, _seconds(record.seconds), share)
                rows.append((*start, *_memory(record), layers))
    header = "tokens,grid,rows,method,time,of attention,peak,kept,saved,largest saved,layers".split(",")
    lines = markdown_table(header, "rlrlrrrrrll", rows)
    if missing:
        lines += ["", f"Not measured, because it does not fit into this machine's memory: {'; '.join(missing)}."]
    return lines


def _targets(figures: Figures) -> list[str]:
    lines = ["", f"## Targets of this project, at {AT[0]:,} tokens and {AT[1]} rows", ""]
    targets = compute_targets(figures)
    if not targets:
        return [*lines, "Not measured in this run."]
    large = [record for rows in figures.rows for record in figures.line(rows, OURS) if record.full_size_saved]
    shapes = "; ".join(f"{record.full_size_saved} at {record.length:,}" for record in large) or "none"
    name = "saved tensors of Hq x R x video or Hq x L x D, at any length"
    return lines + targets_table(targets, (name, "none", shapes, verdict(not large)))


def _mask_loss(figures: Figures) -> list[str]:
    records = [figures.get(*AT, method) for method in (LOSS_OURS, LOSS_PLAIN)]
    if None in records:
        return []
    rows = [(record.method, _seconds(record.seconds), *_memory(record)) for record in records]
    title = f"## The mask loss alone, {AT[1]} rows x {GEOMETRY.patches} patches of {records[0].grid}"
    return ["", title, "", *markdown_table(("", "time", "peak", "kept", "saved", "largest saved"), "lrrrrl", rows)]


def _memory(record: Record) -> tuple[str | None, ...]:
    sizes = (_size(size) for size in (record.peak_bytes, record.kept_bytes, record.saved_bytes))
    return *sizes, record.largest_saved


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def _size(value: int | None) -> str | None:
    return None if value is None else f"{value / 1e6:.1f} MB" if value < 100e6 else f"{value / 1e6:,.0f} MB"


def draw_picture(records: Iterable[Record], path: Path) -> None:
    """Draw extra time and extra peak memory over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = list(records)
    figures = Figures(records)
    styles = dict(zip(figures.rows, ("-", "--", ":"), strict=False))

    def lines_of(quantity) -> list[Line]:
        found = []
        for method, color in COLORS.items():
            for rows, style in styles.items():
                points = [(record.length, quantity(record)) for record in figures.line(rows, method)]
                found += [Line(f"{method}, {rows}", points, color, style)] if points else []
        return found

    attention = [(length, seconds) for length in figures.lengths if (seconds := figures.attention(length))]
    yardstick = [Line(f"flash attention, {GEOMETRY.supervised} layers", attention, "0.4")] if attention else []
    ticks = {length: f"{length // 1024} k" for length in figures.lengths}
    figure, (times, peaks) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    plot_log_log(times, "extra time, seconds", lines_of(lambda record: record.seconds) + yardstick, ticks)
    plot_log_log(peaks, "extra peak memory, MiB", lines_of(lambda record: record.peak_bytes / 2**20), ticks)
    for axes in (times, peaks):
        axes.set_xlabel("tokens")
    names = ", ".join(f"{name} {rows} rows" for name, rows in zip(("solid", "dashed", "dotted"), styles, strict=False))
    machine = f"{records[0].cpu}, {records[0].threads} threads, {records[0].dtype}"
    figure.suptitle(f"Attention loss, forward and backward, above flash attention: {machine}; {names}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
