"""Registers, spills and number of the kernels that a training run compiles.

On a GPU: those that random batches of a 7B model really build, as the driver reports them. On the CPU: two builds ahead
of time.
"""

from __future__ import annotations

import random

import torch
import triton

from benchmarks.gpu.checks import FAIL, PASS, SKIP, CheckLog, Options
from benchmarks.gpu.layers import random_loss, random_rows, record_launches
from swim_kernels import noun_attention

BATCHES = 200
MOST_BUILDS = 24  # of 13 kernels: one or two tiles, with two kinds of softmax


def run(options: Options, log: CheckLog) -> None:
    if options.device == "cpu":
        build_ahead(log)
        return
    kernels: dict[str, object] = {}
    for patches in (True, False):
        name = "softmax over patches" if patches else "causal softmax"
        with log.judge(f"builds of random batches, {name}") as detail:
            before = count_builds(kernels)
            kernels |= run_batches(20 if options.quick else BATCHES, patches)
            detail.append(f"{count_builds(kernels) - before} builds of {len(kernels)} kernels")
    total = count_builds(kernels)
    state = PASS if total <= MOST_BUILDS else FAIL
    log.add("number of builds", state, f"{total} of at most {MOST_BUILDS}: {tell(kernels)}")
    for name, kernel in kernels.items():
        for build in builds_of(kernel):
            figures = (
                f"{build.n_regs} registers, {build.n_spills} spills, {build.metadata.shared} bytes of shared memory"
            )
            state = FAIL if build.n_spills else PASS
            log.add(f"{name} with triton {triton.__version__}", state, figures)


def run_batches(count: int, patches: bool) -> dict[str, object]:
    """Run a layer and its loss on random batches of a 7B model; return the kernels by name."""
    kernels = {}
    chosen = random.Random(0)
    for seed in range(count):
        length = chosen.randint(600, 6000)
        generator = torch.Generator("cuda").manual_seed(seed)
        query, key = (
            torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
            for heads in (28, 4)
        )
        query, key = (x.transpose(1, 2).requires_grad_() for x in (query, key))
        queries = random_rows(chosen.randint(1, 64), length, patches, seed, "cuda")
        with record_launches() as seen:
            maps = noun_attention(query, key, queries, backend="triton")
            loss = random_loss(maps, queries, (180, 320)) if patches else maps.square().sum()
            loss.backward()
        kernels |= {launch.name: launch.kernel for launch in seen}
    return kernels


def builds_of(kernel) -> list:
    """Return what has been compiled of a `triton.jit` function, on all devices."""
    found = [build for caches in kernel.device_caches.values() for build in caches[0].values()]
    for build in found:
        build._init_handles()  # reads the registers, if it has not been launched yet
    return found


def count_builds(kernels: dict[str, object]) -> int:
    return sum(len(builds_of(kernel)) for kernel in kernels.values())


def tell(kernels: dict[str, object]) -> str:
    return ", ".join(f"{name} {len(builds_of(kernel))}" for name, kernel in kernels.items())


def build_ahead(log: CheckLog) -> None:
    """Build two kernels for sm_90, as anywhere."""
    from benchmarks.kernels.configurations import Configuration
    from benchmarks.kernels.records import build_one
    from swim_kernels.attention_rows.triton.tiles import choose_tile

    for kernel in ("maps", "key_gradients"):
        tile = choose_tile(kernel, 8, 8, 128, "bf16", 90)
        result = build_one(Configuration(kernel, 90, "bf16", 128, tile))
        complaints = "; ".join(result.complaints())
        figures = complaints or f"{result.build.registers} registers, {result.build.shared} bytes of shared memory"
        log.add(f"{kernel} for sm_90 with triton {triton.__version__}", FAIL if complaints else PASS, figures)
    log.add("builds of random batches", SKIP, "they are compiled for the GPU of the machine, and there is none")
