"""Time and memory of the attention loss beside flash attention: `python -m benchmarks.attention_loss`.

Nothing is measured unless the methods agree first. Every record is written at once, in place of the one that was
measured before at the same length, rows and method; then table and picture are drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.attention_loss.agreement import assert_methods_agree
from benchmarks.attention_loss.check import check
from benchmarks.attention_loss.measure import measure_all, open_records
from benchmarks.attention_loss.report import CSV, HERE, REPORT, draw

QUICK = {"lengths": [4096], "rows": [8], "rounds": 5, "output": Path("runs/bench-quick")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_loss", description=__doc__.split(":")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="tokens")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64], help="noun tokens")
    parser.add_argument("--rounds", type=int, help="runs of everything; default: 1 of what is slow, 3 of the rest")
    parser.add_argument("--memory-gib", type=float, default=8, help="if a method keeps more, measure fewer layers")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    job = parser.add_mutually_exclusive_group()
    job.add_argument(
        "--quick", action="store_true", help="4,096 tokens and 8 rows, each five times, into runs/bench-quick"
    )
    job.add_argument("--check", type=Path, metavar="CSV", help="only compare its ratios with the committed ones")
    job.add_argument("--draw", action="store_true", help="only draw table and picture again from the CSV")
    args = parser.parse_args()
    if args.check:
        if not args.check.exists():
            parser.error(f"--check {args.check}: no such file")
        now, committed = (open_records(path).records.values() for path in (args.check, HERE / CSV))
        sys.exit(check(now, committed))
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    if not args.draw:
        assert_methods_agree()
        measure_all(args.lengths, args.rows, args.rounds, int(args.memory_gib * 2**30), args.output / CSV)
    draw(args.output)
    print((args.output / REPORT).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
