"""Comparison of measured ratios with the committed ones: ratios carry over from machine to machine, times do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.attention_loss.measure import Record
from benchmarks.attention_loss.report import Figures

ALLOWED_LOSS = 0.2


@dataclass(frozen=True)
class Comparison:
    """A ratio of swim_fast's cost to an alternative's, now and as committed; `now` is None if it was not measured."""

    name: str
    now: float | None
    committed: float

    @property
    def change(self) -> float | None:
        return None if self.now is None else self.now / self.committed - 1

    @property
    def lost(self) -> bool:
        return self.change is None or self.change > ALLOWED_LOSS


def compare(now: Iterable[Record], committed: Iterable[Record]) -> list[Comparison]:
    """Return the ratios of every length and number of rows at which swim_fast was measured now and committed."""
    measured = sorted({(record.length, record.rows) for record in now})
    now, committed = Figures(now), Figures(committed)
    return [
        Comparison(f"{length:,} tokens, {rows} rows: {name}", ratio, known)
        for length, rows in measured
        for name, ratio in now.ratios(length, rows).items()
        if (known := committed.ratios(length, rows).get(name)) is not None
    ]


def check(now: Iterable[Record], committed: Iterable[Record]) -> int:
    """Print a table of the ratios; return 1 if any grew by more than 20 %, is missing, or none can be compared."""
    comparisons = compare(now, committed)
    if not comparisons:
        print("nothing to compare: no length and number of rows has both measured and committed ratios")
        return 1
    width = max(len(comparison.name) for comparison in comparisons)
    print(f"{'cost of swim_fast':{width}}  ratio now  ratio committed   change")
    for found in comparisons:
        now, change = ("missing", "") if found.now is None else (f"{found.now:.3g}", f"{found.change:+.1%}")
        print(f"{found.name:{width}} {now:>10} {found.committed:>16.3g} {change:>8}{'  LOST' * found.lost}")
    lost = [found.name for found in comparisons if found.lost]
    if lost:
        print(f"missing, or lost more than {ALLOWED_LOSS:.0%}:", *lost, sep="\n  ")
    return int(bool(lost))
