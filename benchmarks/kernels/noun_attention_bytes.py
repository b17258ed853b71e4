"""Bytes that noun attention's Triton kernels move, counted in the interpreter, against the least that must be moved.

    TRITON_INTERPRET=1 python -m benchmarks.kernels.noun_attention_bytes     # minutes; writes noun_attention_bytes.csv

One layer of 28 query and 4 key heads, head_dim 128, bf16: a video of most of the sequence, read out by a few tokens at
its end. `kernel_report.py` draws the table.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CSV = Path(__file__).with_name("noun_attention_bytes.csv")
FIELDS = ["rows", "length", "phase", "launch", "kernel", "tensor", "access", "issued", "unique", "floor"]
NUM_HEADS, NUM_KEY_HEADS, HEAD_DIM, BYTES = 28, 4, 128, 2
PHASES = ("forward, lse given", "forward, lse computed", "backward", "backward, added")


@dataclass(frozen=True)
class Floor:
    """The least traffic of each phase: every needed byte once.

    Forward reads the keys that are read out, or, where lse is computed, all of the range; it writes the maps.
    Backward reads the keys of the range and the maps' gradient and writes ∂k; in the attention's own node, where it is
    added to the attention's, ∂k is read as well. Query rows and their gradients, R · Hq · D, are left out: they are
    small.
    """

    read_out: int
    range: int
    maps: int
    key: int

    def of(self, phase: str) -> int:
        return {
            "forward, lse given": self.read_out + self.maps,
            "forward, lse computed": self.range + self.maps,
            "backward": self.range + self.maps + self.key,
            "backward, added": self.range + self.maps + 2 * self.key,
        }[phase]


def measure(num_rows: int, length: int, *, num_heads: int = NUM_HEADS, num_key_heads: int = NUM_KEY_HEADS):
    """Traffic of each phase, and the floor."""
    import torch

    from benchmarks.kernels.byte_counter import count_bytes
    from swim_kernels import NounQueries, noun_attention
    from swim_kernels.noun_attention.triton import launch as triton_backend

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, num_heads, length, HEAD_DIM, generator=generator).bfloat16()
    key = torch.randn(1, num_key_heads, length, HEAD_DIM, generator=generator).bfloat16()
    query.requires_grad_(), key.requires_grad_()
    position = length - 1 - 3 * torch.arange(num_rows)
    columns = torch.arange(16, length - 8 * num_rows)[None]
    zeros = torch.zeros_like(position)
    queries = NounQueries(zeros, position, zeros, position + 1, zeros, columns)

    a_key = num_key_heads * HEAD_DIM * BYTES
    floor = Floor(
        read_out=columns.shape[1] * a_key,
        range=length * a_key,
        maps=num_rows * columns.shape[1] * 4,
        key=length * a_key,
    )
    lse = torch.full((num_rows, num_heads), 16.0)
    traffic = {}
    with torch.no_grad(), count_bytes() as traffic["forward, lse computed"]:
        noun_attention(query, key, queries, backend="triton")
    with count_bytes() as traffic["forward, lse given"]:
        maps = noun_attention(query, key, queries, lse=lse, backend="triton")
    gradient = torch.randn(maps.shape, generator=generator)
    with count_bytes() as traffic["backward"]:
        maps.backward(gradient)
    with torch.no_grad(), count_bytes() as traffic["backward, added"]:
        scale = HEAD_DIM**-0.5
        triton_backend.add_gradients(query.grad, key.grad, gradient, query, key, queries, scale, lse)
    return traffic, floor


def main() -> None:
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for num_rows, length in ((4, 16384), (16, 16384)):
            start = time.perf_counter()
            traffic, floor = measure(num_rows, length)
            for phase in PHASES:
                for row in traffic[phase].rows():
                    if row.kernel.startswith("torch.") and not phase.startswith("backward"):
                        continue  # the plan, made once per batch, and checks of the arguments
                    writer.writerow(
                        [
                            num_rows,
                            length,
                            phase,
                            row.launch,
                            row.kernel,
                            row.tensor,
                            row.access,
                            row.issued,
                            row.unique,
                        ]
                        + [floor.of(phase)]
                    )
            file.flush()
            print(f"{num_rows} rows, {length} keys: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1: bytes are counted in the interpreter")
    main()
