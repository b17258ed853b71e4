"""Measure the cost of the attention loss and of the input in training: `python -m benchmarks.training`.

The parts are in `steps.py`, `input.py` and `profile.py`, their clips and models in `material.py`, tables and targets in
`report.py`. Every figure is written when it is there: a run that is killed loses nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.training import input as training_input
from benchmarks.training import profile as training_profile
from benchmarks.training import report
from benchmarks.training import steps as training_steps

PARTS = ("steps", "padding", "loading", "profile", "collation")
ROUNDS = {"tiny": 12, "0.1 B": 3}  # steps of each kind


def measure(parts: list[str], folder: Path, output: Path) -> None:
    """Measure some of `PARTS` in a scratch folder, and write their figures."""
    put = report.open_records(output).put
    if "padding" in parts:
        put(*report.padding_records(training_input.measure_padding(folder)))
    if "collation" in parts:
        put(*report.collation_records(training_input.measure_collation(folder)))
    if "loading" in parts:
        for name, clips in training_input.LOADED.items():
            put(*report.loading_records(training_input.measure_loading(folder, name, clips)))
    if "profile" in parts:
        for name, clips in training_input.LOADED.items():
            put(*report.profile_records(training_profile.measure_profile(folder, name, clips)))
    if "steps" in parts:
        for size, rounds in ROUNDS.items():
            for ranks in (1, 2):
                put(*report.step_records(size, training_steps.run(folder, size, ranks, rounds)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split(":")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"which of {', '.join(PARTS)}; all without")
    parser.add_argument("--output", type=Path, default=report.HERE, help="folder of the results")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SWIM_FAST_CACHE"] = f"{folder}/cache"
        measure(args.parts or list(PARTS), Path(folder), args.output)
    print(report.draw(args.output))


if __name__ == "__main__":
    main()
