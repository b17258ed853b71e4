"""Tables and targets of the benchmark of training, drawn from its CSV."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.core import RecordFile, Target, describe_machine, markdown_table, targets_table
from benchmarks.training.input import BATCH, PACK_TOKENS, RANKS, WORKERS, Collation, Loading, Padding
from benchmarks.training.profile import PARTS, Profile
from benchmarks.training.steps import DTYPES, Steps

HERE = Path(__file__).parent
CSV, REPORT = "training.csv", "training.md"
UNAVOIDABLE = ("resizing", "text", "handing over")  # parts: the processor's pixels and tokens, in the trainer's process
OVERHEAD, ROOM, SHARE, FASTER, COLLATION = 0.03, 1.05, 0.85, 4.0, 0.010  # the targets


@dataclass(frozen=True)
class Record:
    """A row of the CSV: one figure. `value` is the median of the rounds, `lowest` and `highest` their extremes."""

    part: str  # step, padding, loading, profile, collation
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


def open_records(folder: Path) -> RecordFile[Record]:
    return RecordFile(folder / CSV, Record, "part", "case", "measure")


def record(
    part: str, case: str, measure: str, values: Sequence[float], unit: str, about: str, threads: int | None = None
) -> Record:
    """Return the record of all rounds' values, measured here."""
    where = describe_machine() | ({"threads": threads} if threads else {})
    spread = {"value": statistics.median(values), "lowest": min(values), "highest": max(values), "rounds": len(values)}
    return Record(part=part, case=case, measure=measure, unit=unit, about=about, **spread, **where)


def step_records(size: str, steps: Steps) -> list[Record]:
    ranks = f"{steps.ranks} rank{'s' * (steps.ranks > 1)}"
    case = f"{size}, {ranks}"
    about = (
        f"{steps.parameters / 1e6:.1f} M parameters, {DTYPES[size]}, {steps.tokens:,} tokens and {steps.nouns} noun "
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
        record("padding", "padded", "slots per token", [padding.padded], "", batches),
        record("padding", "packed", "slots per token", [padding.packed], "", packs),
        record("padding", "packed, room", "slots per token", [padding.room], "", f"{packs}, dealt to {RANKS} ranks"),
    ]


def loading_records(loading: Loading) -> list[Record]:
    about = f"{loading.samples} samples, {loading.frames} frames, {WORKERS} workers; load average {loading.load:.1f}"
    all_three = {"everything": loading.everything, "decoding alone": loading.decoding, "common path": loading.common}
    rates = {name: [loading.samples / value for value in seconds] for name, seconds in all_three.items()}
    return [record("loading", loading.name, name, values, "samples/s", about) for name, values in rates.items()]


def profile_records(profile: Profile) -> list[Record]:
    about = f"{profile.samples} samples, {profile.decoded / 1e6:.0f} MB of decoded frames each"
    return [record("profile", profile.name, part, values, "s", about, 1) for part, values in profile.parts.items()]


def collation_records(collation: Collation) -> list[Record]:
    about = f"{collation.tokens:,} tokens, {collation.pairs} pairs"
    measures = {"padded": "collation, padded", "packed": "collation, packed", "processor": "the processor"}
    measures["building"] = "decoding, processor, nouns and masks"
    values = asdict(collation)
    return [record("collation", "one sample", text, values[key], "s", about, 1) for key, text in measures.items()]


def draw(folder: Path) -> str:
    """Write the report from the CSV; return it."""
    text = draw_text(open_records(folder).records.values())
    (folder / REPORT).write_text(text, encoding="utf-8")
    return text


class Figures:
    """Records by part, case and measure."""

    def __init__(self, records: Iterable[Record]):
        self._records = {(r.part, r.case, r.measure): r for r in records}

    def cases(self, part: str) -> list[str]:
        return list(dict.fromkeys(case for p, case, _ in self._records if p == part))

    def get(self, part: str, case: str, measure: str) -> Record:
        return self._records[part, case, measure]

    def all(self, part: str) -> list[Record]:
        return [r for (p, *_), r in self._records.items() if p == part]


def overhead(figures: Figures, case: str) -> float:
    """Return the time that the attention loss adds, of the step without it."""
    with_loss, without = (figures.get("step", case, name).value for name in ("with the attention loss", "without"))
    return with_loss / without - 1


def compute_targets(figures: Figures) -> list[Target]:
    """Return the targets whose figures are there."""
    found = []
    for case in figures.cases("step"):
        found.append(Target(f"attention loss, of a step: {case}", overhead(figures, case), OVERHEAD, "{:.1%}".format))
    for case in figures.cases("padding"):
        if case != "padded":
            value = figures.get("padding", case, "slots per token").value
            found.append(Target(f"slots per token: {case}", value, ROOM, "{:.2f}".format))
    for case in figures.cases("loading"):
        names = ("everything", "decoding alone", "common path")
        own, alone, common = (figures.get("loading", case, name).value for name in names)
        for name, share, wanted in (("decoding alone", own / alone, SHARE), ("the common path", own / common, FASTER)):
            found.append(Target(f"loader, of {name}: {case}", share, wanted, "{:.2f}".format, at_least=True))
    for found_record in figures.all("collation"):
        if found_record.measure.startswith("collation"):
            name = f"{found_record.measure}: {found_record.about}"
            found.append(Target(name, 1e3 * found_record.value, 1e3 * COLLATION, "{:.1f} ms".format))
    return found


_INTRODUCTION = f"""# Training: what the attention loss and the input cost

Written by `make bench-train`, on a CPU; no figure here is one of a GPU.

- **Step**: the time between the callbacks at a training step's beginning and end, of the real trainer: forward,
  backward, reduction over the ranks (gloo), clipping, AdamW. Every step trains on the same clip. Steps with the
  attention loss and steps without it, in which the same model runs as a stock one, alternate in one run (with, without,
  without, with). Before it the text loss of both is compared, and the mask loss with the eager reference's; nothing is
  timed unless they agree. The vision tower is frozen; attention is torch's. With two ranks each has half of the cores.
  A tiny model has little else to do: its share of the attention loss is above that of a real one.
- **Padding**: token slots in the batches of an epoch over a mixture of clips and texts, for each useful token; of
  packed batches also the slots that they leave empty (their room). Predicted lengths are compared with those of
  collated batches.
- **Loading**: samples per second of the loader with {WORKERS} workers, collated, against a loader that decodes the same
  frames of the same clips by the same library and does nothing else, and against the common path: qwen-vl-utils and the
  processor, as many frames of the same size, without labels and masks. Passes alternate; the first does not count.
  On a machine with other load the common path, which decodes in its workers, has fewer processes that compete for it.
- **Profile of loading**: the same samples in one process with one thread, which does what a worker does; time of a
  sample by part, in the round that other processes disturbed least. A part within another counts for itself alone.
  Pinning is not among them: the trainer's process does it, where there is a GPU.
- **Collation**: of one long sample with one thread, as in a worker, beside the time that it takes to be made.

Other figures are medians; the CSV has the extremes."""


def draw_text(records: Iterable[Record]) -> str:
    records = list(records)
    figures = Figures(records)
    kinds = sorted({(r.cpu, r.torch, r.python) for r in records})
    lines = [_INTRODUCTION, "", *("{}; torch {}, Python {}.".format(*kind) for kind in kinds)]
    lines += ["", "## Targets of this project", "", *targets_table(compute_targets(figures))]
    if figures.cases("step"):
        lines += ["", "## Step", "", *_steps(figures)]
    for part, title in (("padding", "Padding"), ("loading", "Loading"), ("profile", ""), ("collation", "Collation")):
        if part == "profile":
            lines += _profile(figures)
        elif figures.cases(part):
            rows = [(r.case, r.measure, _value(r), r.about) for r in figures.all(part)]
            lines += ["", f"## {title}", "", *markdown_table([""] * 4, "llrl", rows)]
    return "\n".join([*lines, ""])


def _steps(figures: Figures) -> list[str]:
    rows = []
    for case in figures.cases("step"):
        a, b = (figures.get("step", case, name) for name in ("with the attention loss", "without"))
        values = (f"{a.value:.3f} s", f"{b.value:.3f} s", f"{overhead(figures, case):.1%}")
        spans = (f"{r.lowest:.2f} to {r.highest:.2f} s" for r in (a, b))
        rows.append((case, *values, *spans, a.threads, f"{a.about}; {a.rounds} rounds"))
    header = ("model", "with", "without", "more", "lowest to highest with", "without", "threads", "")
    return markdown_table(header, "lrrrrrrl", rows)


def _profile(figures: Figures) -> list[str]:
    """Return the table of parts, and what follows from it for the targets of loading."""
    cases = figures.cases("profile")
    if not cases:
        return []
    seconds = {case: {part: figures.get("profile", case, part).lowest for part in PARTS} for case in cases}
    totals = {case: sum(parts.values()) for case, parts in seconds.items()}
    rows = []
    for part, about in PARTS.items():
        cells = ((f"{1e3 * seconds[c][part]:.1f} ms", f"{seconds[c][part] / totals[c]:.1%}") for c in cases)
        rows.append((part, *(cell for pair in cells for cell in pair), about))
    rows.append(("all", *(cell for c in cases for cell in (f"{1e3 * totals[c]:.1f} ms", "")), ""))
    header = ("part", *(cell for case in cases for cell in (case, "")), "")
    table = markdown_table(header, "l" + "rr" * len(cases) + "l", rows)
    lines = ["", "## Profile of loading", "", *table, "", *(_bound(figures, case, seconds[case]) for case in cases)]
    return lines


def _bound(figures: Figures, case: str, seconds: dict[str, float]) -> str:
    """Return a line on the most that the targets of loading could be, were every part free that a loader can avoid."""
    decoding = seconds["decoding"] + seconds["moving frames"]
    most = decoding / (decoding + sum(seconds[part] for part in UNAVOIDABLE))
    text = (
        f"- {case}: a loader that did nothing but decode, and {', '.join(UNAVOIDABLE)}, would reach {most:.2f} of "
        f"decoding alone (wanted: {SHARE})"
    )
    if case in figures.cases("loading"):
        alone, common = (figures.get("loading", case, name).value for name in ("decoding alone", "common path"))
        text += f"; decoding alone is {alone / common:.2f} times as fast as the common path (wanted: {FASTER})"
    return f"{text}."


def _value(found: Record) -> str:
    if found.unit == "s":
        return f"{1e3 * found.value:,.1f} ms"
    return f"{found.value:.3f} {found.unit}".rstrip()
