"""One part of the GPU check, in a process of its own: `python -m benchmarks.gpu.part NAME …`, started by the check."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.checks import CheckLog, Options


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        module: of `benchmarks.gpu`; its `run(options, log)` does the work.
        seconds: it may take at most.
        interpreted: on the CPU it runs in Triton's interpreter.
        shows: what it is about.
    """

    module: str
    seconds: float
    interpreted: bool
    shows: str


PARTS = {
    "environment": Part("environment", 60, False, "versions, GPU, backends and providers that are chosen"),
    "kernels": Part("suites", 240, True, "Triton kernels against float64, and bit for bit"),
    "providers": Part("suites", 90, False, "every flash attention beside separate nodes"),
    "model": Part("suites", 90, False, "a tiny model: fused, checkpointed, autocast, compiled, in a CUDA graph"),
    "trainer": Part("suites", 90, False, "training steps: losses beside the CPU's, waits of the host"),
    "builds": Part("builds", 60, False, "registers, spills and number of the compiled kernels"),
    "benchmark": Part("benchmark", 150, True, "times against byte floors, other methods, a model's step"),
    "sanitizer": Part("sanitizer", 90, False, "compute-sanitizer on one case of each kernel"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ignore-values", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    values = vars(parser.parse_args())
    part = values.pop("part")
    options = Options(**values)
    log = CheckLog(part, options.output / f"{part}.jsonl")
    importlib.import_module(f"benchmarks.gpu.{PARTS[part].module}").run(options, log)


if __name__ == "__main__":
    main()
