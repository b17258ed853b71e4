"""Choices of the mask loss, compared on the demo at equal steps: `python -m benchmarks.bake_off`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.bake_off.measure import measure_all, sensible_choices
from benchmarks.bake_off.report import CSV, HERE, draw


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bake_off", description=__doc__.split(":")[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each choice")
    parser.add_argument("--clips", type=int, default=1000, help="clips to train on")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--only", default="", metavar="TEXT", help="choices whose name holds this, e.g. 'frame · mean'")
    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder of the results; what is there is not run again"
    )
    parser.add_argument("--draw", action="store_true", help="only draw the table again from the CSV")
    args = parser.parse_args()
    if not args.draw:
        choices = [choice for choice in sensible_choices() if args.only in str(choice)]
        if not choices:
            parser.error(f"--only {args.only!r} fits none of: {'; '.join(map(str, sensible_choices()))}")
        measure_all(choices, args.seeds, args.steps, args.clips, args.workers, args.output / CSV)
    print(draw(args.output))


if __name__ == "__main__":
    main()
