"""Batches of one run on a GPU: everything that the kernels of `swim_kernels` are launched with in training."""

from __future__ import annotations

import random

import torch
import triton
from torch import Tensor

from benchmarks.kernels.fixed_builds import LAYERS
from swim_kernels import (
    GridPairs,
    NounQueries,
    PackedMasks,
    flash_noun_attention,
    grid_metrics,
    grid_prediction,
    mask_bce,
    noun_mass,
)
from swim_kernels import noun_attention as noun_attention_op
from swim_kernels.attention_rows.triton import kernels as row_kernels
from swim_kernels.grid_prediction.triton import kernels as grid_kernels
from swim_kernels.mask_bce.triton import kernels as mask_kernels
from swim_kernels.noun_attention.triton import kernels as map_kernels
from swim_kernels.noun_mass.triton import kernels as mass_kernels

MODULES = (row_kernels, map_kernels, mass_kernels, grid_kernels, mask_kernels)
KERNELS = [f for module in MODULES for f in vars(module).values() if isinstance(f, triton.JITFunction)]
HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128


def forget_builds() -> None:
    """Let Triton choose its builds again, from the cache on disk where they are."""
    for kernel in KERNELS:
        kernel.device_caches.clear()


def builds() -> dict[str, list]:
    """Return what this process has compiled or loaded for the first GPU, by name of the kernel."""
    found = {kernel.__name__: list(kernel.device_caches[0][0].values()) for kernel in KERNELS if kernel.device_caches}
    return {name: compiled for name, compiled in found.items() if compiled}


class Batches:
    """Random batches, forward and backward through the ops of a training step.

    Args:
        fused: attention output and maps from one node; else from two.
        over: keys of the softmax of the maps, as in `NounQueries`.
    """

    def __init__(self, fused: bool, over: str, heads=HEADS, key_heads=KEY_HEADS, head_dim=HEAD_DIM, seed=0) -> None:
        self.fused, self.over, self.head_dim = fused, over, head_dim
        self.heads, self.key_heads, self.random = heads, key_heads, random.Random(seed)

    def __next__(self) -> None:
        """Run the next batch."""
        draw = self.random
        num_rows = draw.choice([draw.randint(1, 20), draw.randint(1, 512)])
        self.run(num_rows, draw.randint(200, 3000), draw.choice([1, 1, 2]), draw.randint(1, 4))

    def run(self, num_rows: int, length: int, batch: int = 1, num_sets: int = 1) -> None:
        """Run one batch of random rows."""
        draw = self.random
        height, width = draw.randint(3, 9), draw.randint(3, 9)
        queries = self.make_queries(num_rows, length, batch, num_sets, 2 * height * width + draw.randint(0, 3))
        maps, outputs = [], []
        for _ in range(LAYERS):
            query, key, value = (self.make_input(heads, length, batch) for heads in (self.heads, *2 * [self.key_heads]))
            if self.fused:
                output, layer = flash_noun_attention(query, key, value, queries)
                outputs.append(output.sum())
            else:
                layer = noun_attention_op(query, key, queries)
            maps.append(layer)
        rows = torch.arange(num_rows).repeat(2)
        starts = torch.tensor([0, height * width]).repeat_interleave(num_rows)
        pairs = GridPairs.from_rows(rows, starts, [(height, width)] * len(rows), torch.zeros_like(rows)).to("cuda")
        masks = PackedMasks.pack([torch.ones(draw.randint(20, 90), draw.randint(20, 90), dtype=torch.uint8)]).to("cuda")
        cells = grid_prediction(maps, pairs, prediction="probability")
        grid_metrics(maps, pairs, *torch.ones(2, pairs.num_cells, device="cuda"))
        (mask_bce(cells, pairs, masks).sum() + sum(outputs)).backward(retain_graph=True)
        for layer in maps:  # gradients of another kind: that of a sum, and one at any address
            layer.backward(draw.choice([self.at_any_address(layer), layer.new_ones(()).expand_as(layer)]))

    def at_any_address(self, like: Tensor) -> Tensor:
        """Return an empty tensor that begins up to 15 elements into its memory."""
        offset = self.random.randrange(16)
        return torch.empty(like.numel() + offset, device=like.device)[offset:].view_as(like)

    def make_input(self, heads: int, length: int, batch: int) -> Tensor:
        """Return [B, H, L, D] in memory of that order, or with the heads of a token side by side, as models have it."""
        shape = batch, length, heads, self.head_dim
        if self.random.random() < 0.5:
            shape = batch, heads, length, self.head_dim
        tensor = torch.empty(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
        return tensor if shape[1] == heads and shape[2] == length else tensor.transpose(1, 2)

    def make_queries(self, num_rows: int, length: int, batch: int, num_sets: int, columns: int) -> NounQueries:
        """Return rows on the GPU, with all that may be known on the host."""
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))

        def integers(low, high, *shape):
            return torch.randint(low, high, shape, generator=generator)

        position, first = integers(length // 2, length, num_rows), torch.zeros(num_rows, dtype=torch.int64)
        sequence, key_set = integers(0, batch, num_rows), integers(0, num_sets, num_rows)
        sets = integers(0, length // 2, num_sets, columns)
        queries = NounQueries(sequence, position, first, position + 1, key_set, sets, over=self.over)
        return queries.to("cuda", non_blocking=True)


class SetBatches(Batches):
    """Random batches through `noun_mass`, of up to 40 sets."""

    def run(self, num_rows: int, length: int, batch: int = 1, num_sets: int = 1) -> None:
        """Run one batch of random rows, in as many samples as there are key sets."""
        draw = self.random
        queries = self.make_queries(num_rows, length, batch, num_sets, draw.randint(0, 3))
        query, key = (self.make_input(heads, length, batch) for heads in (self.heads, self.key_heads))
        sets = torch.randint(-1, length, (num_sets, draw.randint(1, 40), draw.randint(1, 200))).to("cuda")
        masses = noun_mass(query, key, queries, sets)
        masses.sum().backward(retain_graph=True)
        masses.backward(self.at_any_address(masses))
        with torch.no_grad():
            noun_mass(query, key, queries, sets, lse=self.at_any_address(masses[..., 0]))


class HeadBatches(Batches):
    """Random batches through maps of each head."""

    def run(self, num_rows: int, length: int, batch: int = 1, num_sets: int = 1) -> None:
        """Run one batch of random rows."""
        draw = self.random
        num_rows = min(num_rows, 64)
        queries = self.make_queries(num_rows, length, batch, num_sets, draw.randint(1, 200))
        query, key, value = (self.make_input(heads, length, batch) for heads in (self.heads, *2 * [self.key_heads]))
        if self.fused:
            output, maps = flash_noun_attention(query, key, value, queries, heads="each")
            output.sum().backward(retain_graph=True)
        else:
            maps = noun_attention_op(query, key, queries, heads="each")
        maps.sum().backward(retain_graph=True)
        maps.backward(self.at_any_address(maps))
