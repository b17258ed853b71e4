"""What the attention loss and the input cost in training: `python -m benchmarks.training`.

The parts are in `training_steps.py` and `training_input.py`, their clips and models in `training_material.py`, tables
and targets in `training_report.py`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.training import input as training_input
from benchmarks.training import report as training_report
from benchmarks.training import steps as training_steps

PARTS = ("steps", "padding", "loading", "collation")
ROUNDS = {"tiny": 12, "0.1 B": 3}  # steps of each kind


def measure(parts: list[str], folder: Path, output: Path) -> None:
    """Measures, and writes every figure when it is there: a run that is killed loses nothing."""
    if "padding" in parts:
        training_report.write(training_report.padding_records(training_input.measure_padding(folder)), output)
    if "collation" in parts:
        training_report.write(training_report.collation_records(training_input.measure_collation(folder)), output)
    if "loading" in parts:
        for name, clips in training_input.LOADED.items():
            loading = training_input.measure_loading(folder, name, clips)
            training_report.write(training_report.loading_records(loading), output)
    if "steps" in parts:
        for size, rounds in ROUNDS.items():
            for ranks in (1, 2):
                steps = training_steps.run(folder, size, ranks, rounds)
                training_report.write(training_report.step_records(size, steps), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"which of {', '.join(PARTS)}; all without")
    parser.add_argument("--output", type=Path, default=training_report.HERE, help="folder of the results")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SWIM_FAST_CACHE"] = f"{folder}/cache"
        measure(args.parts or list(PARTS), Path(folder), args.output)
    training_report.draw(args.output)
    print((args.output / f"{training_report.NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
