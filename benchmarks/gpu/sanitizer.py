"""compute-sanitizer's memcheck and racecheck on one case of each kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.checks import FAIL, PASS, SKIP, CheckLog, Options

TOOLS = ("memcheck", "racecheck")


def run(options: Options, log: CheckLog) -> None:
    program = find_program()
    if options.device == "cpu" or program is None:
        reason = "there is no GPU" if options.device == "cpu" else "compute-sanitizer is not installed (CUDA toolkit)"
        for tool in TOOLS:
            log.add(tool, SKIP, reason)
        if options.device == "cpu":
            run_case("cpu", "torch")
        return
    for tool in TOOLS:
        words = [program, "--tool", tool, sys.executable, "-m", "benchmarks.gpu.sanitizer"]
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else it would not see the ends of tensors
        try:
            seconds = options.seconds / len(TOOLS) - 2
            done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            log.add(tool, SKIP, f"not done after {seconds:.0f} s")
            continue
        said = done.stdout + done.stderr
        (options.output / f"{tool}.log").write_text(said, encoding="utf-8")
        found = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+)[^\n]*", said)
        if found is None:
            log.add(tool, SKIP, f"it made no summary, exit code {done.returncode} (see {tool}.log)")
        else:
            log.add(tool, FAIL if int(found[2]) or done.returncode else PASS, found[0])


def find_program() -> str | None:
    """Return the path of compute-sanitizer, None if it is not there."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    return shutil.which("compute-sanitizer") or next((str(place) for place in places if place.exists()), None)


def run_case(device: str, backend: str) -> None:
    """Run every kernel once: both kinds of softmax, few rows and many."""
    from benchmarks.gpu.layers import random_loss, random_rows
    from swim_kernels import noun_attention, noun_mass

    for patches, num_rows in ((True, 3), (False, 3), (False, 40)):
        query, key = (
            torch.randn(1, heads, 200, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2)
        )
        queries = random_rows(num_rows, 200, patches, 0, device)
        maps = noun_attention(query, key, queries, backend=backend)
        loss = random_loss(maps, queries, (30, 50)) if patches else maps.square().sum()
        loss += noun_attention(query, key, queries, heads="each", backend=backend).square().sum()
        loss += noun_mass(query, key, queries, queries.key_sets[:, None], backend=backend).square().sum()
        loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_case("cuda", "triton")
