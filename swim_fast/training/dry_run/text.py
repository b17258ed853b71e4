"""Text of a dry run: aligned tables and a histogram."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swim_fast.config import RunConfig
from swim_fast.training.dry_run.memory import GIB, Batch, Estimate, Part, Settings
from swim_fast.training.dry_run.schedule import Lengths, Schedule

BARS = 10  # of the histogram


def format_table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Return the lines of a table with a heading row; the first column is aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append((indent + "  ".join(cells)).rstrip())
    return [lines[0], indent + "  ".join("-" * width for width in widths), *lines[1:]]


def draw_histogram(values: np.ndarray, bars: int = BARS, width: int = 40) -> list[str]:
    """Return the lines of a histogram of int64 values: each has a range, its count and a bar."""
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(bars, high - low + 1) + 1).round().astype(np.int64))
    counts, _ = np.histogram(values, edges)
    rows = [(f"{a:,}", f"{b - 1:,}", f"{n:,}", n) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"  {a:>{wide[0]}} – {b:>{wide[1]}}  {count:>{wide[2]}}  {'#' * round(width * n / counts.max())}".rstrip()
        for a, b, count, n in rows
    ]


def name_devices(config: RunConfig, gpus: int) -> str:
    """Return the devices whose memory is meant, in words."""
    return "the CPU" if config.training.get("use_cpu") else f"each of {gpus} GPU(s)"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def format_model(config: RunConfig, parts: Sequence[Part], estimated: Estimate, run: Settings) -> list[str]:
    rows = [("part", "trained", "frozen", "weights", "gradients", "optimizer")]
    for part in parts:
        held = estimated.states[part.name]
        sizes = (held.weights, held.gradients, held.optimizer)
        rows.append((part.name, f"{part.trainable:,}", f"{part.frozen:,}", *map(_gib, sizes)))
    trained, frozen = sum(p.trainable for p in parts), sum(p.frozen for p in parts)
    sizes = (estimated.items[name] for name in ("weights", "gradients", "optimizer states"))
    rows.append(("together", f"{trained:,}", f"{frozen:,}", *map(_gib, sizes)))
    engine = "no DeepSpeed" if run.stage is None else f"DeepSpeed ZeRO-{run.stage}"
    engine = "FSDP2" if run.fsdp else engine
    engine += f", samples shared by {run.sequence_parallel}" if run.sequence_parallel > 1 else ""
    offloaded = [name for name in ("optimizer", "parameters") if getattr(run, f"offload_{name}")]
    engine += f", {' and '.join(offloaded)} on the host" if offloaded else ""
    count = f"{(trained + frozen) / 1e9:.2f} B" if trained + frozen >= 1e8 else f"{(trained + frozen) / 1e6:.2f} M"
    heading = f"model {config.model.path}: {count} parameters; GiB on {name_devices(config, run.gpus)}"
    return [f"{heading}, {engine}, {run.optim}", "", *format_table(rows), ""]


def format_lengths(lengths: Sequence[Lengths]) -> list[str]:
    rows = [("tokens per sample", "records", "measured", "min", "median", "p95", "max", "with problems")]
    for source in lengths:
        usable = source.usable
        figures = [f"{int(np.percentile(usable, p)):,}" if len(usable) else "" for p in (0, 50, 95, 100)]
        bad = f"{len(source.measured) - len(usable):,}"
        rows.append((source.name, f"{source.records:,}", f"{len(source.measured):,}", *figures, bad))
    usable = np.concatenate([source.usable for source in lengths])
    lines = [*format_table(rows), "", *draw_histogram(usable), ""]
    if any(len(source.usable) < len(source.measured) for source in lengths):
        lines += ["  `swim-fast data check FILE` lists the problems; training leaves these records out.", ""]
    return lines


def format_schedule(
    config: RunConfig, arguments, schedule: Schedule, lengths: Sequence[Lengths], gpus: int
) -> list[str]:
    accumulation, packed = arguments.gradient_accumulation_steps, config.data.max_tokens_per_batch
    each = f"pack of up to {packed:,} tokens" if packed else f"{arguments.per_device_train_batch_size} sample(s)"
    on_cpu, sharing = config.training.get("use_cpu"), config.sequence_parallel
    devices, one = ("1 CPU", "a") if on_cpu else (f"{gpus} GPU(s)", "a GPU's")
    about = any(len(source.measured) < source.records for source in lengths)
    shared = f" / {sharing} that share each" if sharing > 1 else ""
    rows = [
        ("schedule", ""),
        ("samples per epoch", f"{schedule.samples:,}"),
        ("global batch", f"{schedule.samples_per_step:.0f} samples = {each} × {accumulation} × {devices}{shared}"),
        ("steps per epoch", f"{schedule.steps_per_epoch:,}"),
        ("steps in all", f"{schedule.steps:,}"),
        (f"tokens of {one} batch, median", f"{int(np.median(schedule.batches)):,}"),
        (f"tokens of {one} batch, longest", f"{int(schedule.batches.max()):,}"),
    ]
    note = ["  (lengths of records that were not measured: drawn from those that were)"] if about else []
    return [*format_table(rows), *note, ""]


def format_memory(
    batches: dict[str, Batch], estimates: dict[str, Estimate], changes: Sequence[str], memory: float, devices: str
) -> list[str]:
    rows = [(f"GiB on {devices}", *(f"{name} ({batches[name].tokens:,} tokens)" for name in estimates))]
    for item in estimates["longest"].items:
        rows.append((item, *(_gib(found.items[item]) for found in estimates.values())))
    rows.append(("(at the optimizer's step)", *(_gib(found.step) for found in estimates.values())))
    rows.append(("all, with context and fragmentation", *(_gib(found.total) for found in estimates.values())))
    longest = estimates["longest"].total / GIB
    if not changes:
        verdict = [f"fits: {longest:.1f} of {memory:g} GiB on {devices}, an estimate"]
    else:
        verdict = [
            f"does not fit: {longest:.1f} GiB are needed, and there are {memory:g}; change first:",
            *(f"  {number}. {change}" for number, change in enumerate(changes, 1)),
        ]
    if "limit" in estimates and estimates["limit"].total > memory * GIB >= estimates["longest"].total:
        most = estimates["limit"].total / GIB
        verdict.append(f"a batch at the limit of {batches['limit'].tokens:,} tokens would not: {most:.1f} GiB")
    return [*format_table(rows), "", *verdict]
