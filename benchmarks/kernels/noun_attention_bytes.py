"""Bytes that noun attention's Triton kernels move, counted in the interpreter, against the least that must be moved.

    TRITON_INTERPRET=1 python -m benchmarks.kernels.noun_attention_bytes     # minutes; writes noun_attention_bytes.csv

One layer of 28 query and 4 key heads, head_dim 128, bf16: a video of most of the sequence, read out by a few tokens at
its end, under the model's own softmax or under one over each patch.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.records import TrafficRecord, open_traffic

NUM_HEADS, NUM_KEY_HEADS, HEAD_DIM, BYTES = 28, 4, 128, 2
PATCHES = 16
PHASES = ("forward, lse given", "forward, lse computed", "backward", "backward, added")
CASES = ((4, 16384, "causal"), (16, 16384, "causal"), (4, 16384, "patches"))


@dataclass(frozen=True)
class Floor:
    """The least traffic of each phase: every needed byte once.

    Forward reads the keys that are read out, or, where lse is computed, all of the softmax; it writes the maps.
    Backward reads the keys of the softmax and the maps' gradient and writes ∂k; in the attention's own node, where it
    is added to the attention's, ∂k is read as well, as far as the softmax reaches. Query rows and their gradients,
    R · Hq · D, are left out: they are small.
    """

    read_out: int
    softmax: int
    maps: int
    key: int
    added: int

    def of(self, phase: str) -> int:
        return {
            "forward, lse given": self.read_out + self.maps,
            "forward, lse computed": self.softmax + self.maps,
            "backward": self.softmax + self.maps + self.key,
            "backward, added": self.softmax + self.maps + 2 * self.added,
        }[phase]


def key_bytes(num_keys: int, num_key_heads: int = NUM_KEY_HEADS) -> int:
    return num_keys * num_key_heads * HEAD_DIM * BYTES


def measure(
    num_tokens: int,
    length: int,
    softmax: str = "causal",
    *,
    num_heads: int = NUM_HEADS,
    num_key_heads: int = NUM_KEY_HEADS,
):
    """Return the traffic of each phase, and the floor."""
    import torch

    from benchmarks.kernels.byte_counter import count_bytes
    from swim_kernels import NounQueries, noun_attention
    from swim_kernels.noun_attention.triton import launch as triton_backend

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, num_heads, length, HEAD_DIM, generator=generator).bfloat16()
    key = torch.randn(1, num_key_heads, length, HEAD_DIM, generator=generator).bfloat16()
    query.requires_grad_(), key.requires_grad_()
    position = length - 1 - 3 * torch.arange(num_tokens)
    columns = torch.arange(16, length - 8 * num_tokens)[None]
    if softmax == "patches":
        columns = columns[:, : columns.shape[1] // PATCHES * PATCHES].view(PATCHES, -1)
        position, patch = position.repeat_interleave(PATCHES), torch.arange(PATCHES).repeat(num_tokens)
        zeros = torch.zeros_like(position)
        queries = NounQueries(zeros, position, zeros, zeros, patch, columns, over="set")
    else:
        zeros = torch.zeros_like(position)
        queries = NounQueries(zeros, position, zeros, position + 1, zeros, columns)

    read_out, all_keys = (key_bytes(count, num_key_heads) for count in (columns.numel(), length))
    reached = read_out if softmax == "patches" else all_keys
    floor = Floor(read_out, reached, len(queries) * columns.shape[1] * 4, key=all_keys, added=reached)
    lse = torch.full((len(queries), num_heads), 16.0)
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


def main(folder: Path) -> None:
    file = open_traffic(folder)
    for num_tokens, length, softmax in CASES:
        start = time.perf_counter()
        traffic, floor = measure(num_tokens, length, softmax)
        rows = num_tokens * (PATCHES if softmax == "patches" else 1)
        file.put(
            *(
                TrafficRecord(rows, length, softmax, phase, row.launch, row.kernel, row.tensor, row.access, row.issued,
                              row.unique, floor.of(phase))
                for phase in PHASES
                for row in traffic[phase].rows()
                # of torch only what backward does: the plan is made once per batch
                if not row.kernel.startswith("torch.") or phase.startswith("backward")
            )
        )  # fmt: skip
        print(f"{rows} rows, {length} keys, {softmax}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1: bytes are counted in the interpreter")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
