"""What is known of the Triton kernels without a GPU: `python -m benchmarks.kernels`.

Builds every configuration of `configurations.py` and the kernels of `fixed_builds.py` ahead of time, counts bytes in
the interpreter (`noun_attention_bytes.py`), and draws the report. Every record is written at once, beside those of
other versions of triton.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.kernels.configurations import BLOCK_HEADS, DTYPES, HEAD_DIMS, all_configurations
from benchmarks.kernels.fixed_builds import fixed_builds
from benchmarks.kernels.records import build_all, build_fixed, open_builds, open_fixed
from benchmarks.kernels.report import HERE, draw


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split(":")[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--block-heads", type=int, nargs="*", default=BLOCK_HEADS, help="only groups of so many heads")
    parser.add_argument("--dtypes", nargs="*", default=DTYPES, choices=DTYPES)
    parser.add_argument("--head-dims", type=int, nargs="*", default=HEAD_DIMS)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--no-bytes", action="store_true", help="keep the counts that are there")
    parser.add_argument("--draw", action="store_true", help="only draw the report again from the CSV files")
    args = parser.parse_args()
    if not args.draw:
        if not args.no_bytes:
            words = [sys.executable, "-m", "benchmarks.kernels.noun_attention_bytes", str(args.output)]
            subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        write_builds(args)
    draw(args.output)
    print(args.output / "kernel_report.md")


def write_builds(args: argparse.Namespace) -> None:
    fixed = open_fixed(args.output)
    for build in fixed_builds():
        fixed.put(*build_fixed(build))
    chosen = list(all_configurations(dtypes=args.dtypes, head_dims=args.head_dims, block_heads=args.block_heads))
    builds = open_builds(args.output)
    for count, result in enumerate(build_all(chosen, args.workers), start=1):
        builds.put(result.record())
        print(f"\r{count} of {len(chosen)} builds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
