"""Attention mass of many rows by head, without a map and through maps: `python -m benchmarks.noun_mass`.

One layer, forward and backward, on the CPU: the attention that the tokens of an instruction pay to the video before it.
The ways agree first; then they are timed in turn, round by round, and their memory is counted. Ratios hold for one run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.core import describe_machine, markdown_table
from benchmarks.memory import count_allocations
from swim_kernels import NounQueries, noun_attention, noun_mass

HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128
OURS = "noun_mass"


@dataclass(frozen=True)
class Case:
    """Inputs of a layer and the gradient [R, Hq] that arrives at the masses."""

    query: Tensor
    key: Tensor
    queries: NounQueries
    grad: Tensor

    def cast(self, dtype: torch.dtype) -> Case:
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), grad=self.grad.to(dtype))


def make_case(num_rows: int, length: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return random inputs: a video of 9/10 of the sequence, and rows at tokens behind it."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, length, HEAD_DIM, generator=generator) for heads in (HEADS, KEY_HEADS))
    video = torch.arange(length // 20, length * 19 // 20)
    position = length - 1 - torch.arange(num_rows)
    zeros = torch.zeros_like(position)
    queries = NounQueries(zeros, position, zeros, position + 1, zeros, video[None])
    return Case(query, key, queries, torch.randn(num_rows, HEADS, generator=generator)).cast(dtype)


def compute_masses(query: Tensor, key: Tensor, queries: NounQueries) -> Tensor:
    return noun_mass(query, key, queries, queries.key_sets[:, None])[..., 0]


def compute_masses_with_lse(query: Tensor, key: Tensor, queries: NounQueries) -> Tensor:
    """As `compute_masses`, with an lse that is there already; here a number, as good as any for the time it takes."""
    lse = torch.full((len(queries), query.shape[1]), 15.0)
    return noun_mass(query, key, queries, queries.key_sets[:, None], lse=lse)[..., 0]


def sum_maps_of_each_head(query: Tensor, key: Tensor, queries: NounQueries) -> Tensor:
    return noun_attention(query, key, queries, heads="each").sum(-1)


def sum_maps_of_single_heads(query: Tensor, key: Tensor, queries: NounQueries) -> Tensor:
    """Heads as sequences of one head, whose average is their own map."""
    num_rows, num_heads = len(queries), query.shape[1]
    again = [tensor.repeat(num_heads) for tensor in queries.tensors()[1:5]]
    sequence = torch.arange(num_heads).repeat_interleave(num_rows)
    single = NounQueries(sequence, *again, queries.key_sets)
    keys = key.transpose(0, 1).repeat_interleave(num_heads // key.shape[1], dim=0)
    maps = noun_attention(query.transpose(0, 1), keys, single)
    return maps.sum(-1).view(num_heads, num_rows).t()


def sum_mean_maps(query: Tensor, key: Tensor, queries: NounQueries) -> Tensor:
    """Sums of head-averaged maps [R, 1]: less than what is asked for, as a measure of what the heads cost."""
    return noun_attention(query, key, queries).sum(-1, keepdim=True)


SAME: dict[str, Callable[..., Tensor]] = {
    OURS: compute_masses,
    "maps of each head, summed": sum_maps_of_each_head,
    "maps of single heads as sequences, summed": sum_maps_of_single_heads,
}
OTHERS = {"noun_mass, lse handed over": compute_masses_with_lse, "head-averaged maps, summed: no heads": sum_mean_maps}


def run(function: Callable[..., Tensor], case: Case) -> list[Tensor]:
    """Return masses, ∂query and ∂key."""
    query, key = (tensor.detach().requires_grad_() for tensor in (case.query, case.key))
    masses = function(query, key, replace(case.queries))  # as of a new batch: nothing is remembered
    grad = case.grad.to(masses.dtype) if masses.shape[1] > 1 else case.grad.to(masses.dtype).sum(1, keepdim=True)
    return [masses.detach(), *torch.autograd.grad(masses, (query, key), grad)]


def assert_ways_agree() -> None:
    case = make_case(5, 700, torch.float64)
    expected = run(compute_masses, case)
    for name, function in SAME.items():
        for actual, wanted in zip(run(function, case), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12, msg=f"{name} gives something else")


def measure(case: Case, rounds: int) -> list[tuple[str, float, float]]:
    """Return name, median seconds and peak MB of every way."""
    ways = SAME | OTHERS
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, function in ways.items():
            begin = time.perf_counter()
            run(function, case)
            seconds[name].append(time.perf_counter() - begin)
    found = []
    for name, function in ways.items():
        with count_allocations() as counted:
            run(function, case)
        found.append((name, statistics.median(seconds[name]), counted.peak / 1e6))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noun_mass", description=__doc__.split(":")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=16384, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    assert_ways_agree()
    found = measure(make_case(args.rows, args.length), args.rounds)
    ours = found[0][1]
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    shape = f"{args.rows} rows, {args.length:,} tokens, {HEADS} / {KEY_HEADS} heads of {HEAD_DIM}"
    print(f"{shape}, bf16, forward and backward")
    print(f"{machine}; median of {args.rounds} rounds; load average {os.getloadavg()[0]:.1f}\n")
    rows = [(name, f"{seconds:.2f}", f"{seconds / ours:.1f} ×", f"{peak:.0f}") for name, seconds, peak in found]
    print("\n".join(markdown_table(("", "seconds", "to noun_mass", "peak MB"), "lrrr", rows)))


if __name__ == "__main__":
    main()
