"""Inputs on which mask BCE is tested, and what the formulas say about them."""

from __future__ import annotations

import functools
import importlib
import math
from fractions import Fraction

import torch

from swim_kernels.mask_bce import mask_bce
from swim_kernels.structs.grid_pairs import GridPairs
from swim_kernels.structs.packed_masks import PackedMasks
from tests.kernels.device import triton_on_device

chunked = importlib.import_module("swim_kernels.mask_bce.torch_backend")
dispatch = importlib.import_module("swim_kernels.mask_bce.api")

BACKENDS = ("eager", "torch")

# name: grids of the pairs, sizes of the masks, each pair's mask
CASES = {
    "one pair": ([(3, 5)], [(23, 41)], [0]),
    "rows that share masks": ([(3, 4)] * 5, [(17, 19), (18, 21)], [1, 0, 1, 1, 0]),
    "one cell": ([(1, 1)], [(7, 10)], [0]),
    "one row, one column": ([(1, 6), (5, 1)], [(9, 31), (26, 8)], [0, 1]),
    "masks smaller than the grid": ([(7, 9), (6, 5), (4, 3)], [(3, 4), (1, 1), (2, 11)], [0, 1, 2]),
    "a mask as large as the grid": ([(4, 9)], [(4, 9)], [0]),
    "many rows of cells": ([(40, 2)], [(45, 4)], [0]),
    "grids and masks of many sizes, one unused": (
        [(2, 3), (4, 5), (2, 3), (1, 2), (4, 5), (3, 3)],
        [(13, 14), (33, 5), (8, 8), (6, 17)],
        [3, 0, 3, 1, 3, 0],
    ),
}


def make_pairs(grids, mask_indices) -> GridPairs:
    """Pairs whose rows and first columns nothing here looks at."""
    nothing = torch.full((len(grids),), 77)
    return GridPairs.from_rows(nothing, nothing, list(grids), torch.tensor(mask_indices, dtype=torch.int64))


def make_masks(sizes, seed=0) -> PackedMasks:
    generator = torch.Generator().manual_seed(seed)
    return PackedMasks.pack([torch.rand(*size, generator=generator) < 0.4 for size in sizes])


def make_inputs(case, dtype=torch.float64, num_sets=1, seed=0, saturated=True, layout="contiguous"):
    """cells [K, M], pairs, masks, random gradient of the losses; saturated: a third of the cells is exactly 0 or 1."""
    grids, sizes, numbers = CASES[case]
    pairs, masks = make_pairs(grids, numbers), make_masks(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(num_sets, pairs.num_cells, dtype=torch.float64, generator=generator)
    if saturated:
        cells = (cells * 1.5 - 0.25).clamp(0, 1)
    else:
        cells = 0.05 + 0.9 * cells
    grad = torch.randn(num_sets, len(pairs), dtype=torch.float64, generator=generator)
    return strided(cells.to(dtype), layout), pairs, masks, grad


def strided(cells, layout):
    """The same values [K, M] in other strides."""
    if layout == "contiguous":
        return cells.contiguous()
    if layout == "transposed":
        return cells.t().contiguous().t()
    buffer = cells.new_full((2 * cells.shape[0], 3 * cells.shape[1] + 2), math.nan)  # "sliced"
    return buffer[1::2, 2::3].copy_(cells)


@triton_on_device
def run(cells, pairs, masks, grad, **options):
    """losses, ∂cells"""
    cells = cells.detach().requires_grad_()
    losses = mask_bce(cells, pairs, masks, **options)
    return losses.detach(), torch.autograd.grad(losses, cells, grad.to(losses.dtype))[0]


@functools.cache
def weights(pixels, cells):
    """[pixels, cells] float64, one pixel at a time, from fractions."""
    matrix = torch.zeros(pixels, cells, dtype=torch.float64)
    for x in range(pixels):
        place = max((x + Fraction(1, 2)) * cells / pixels - Fraction(1, 2), Fraction(0))
        before = min(math.floor(place), cells - 1)
        after = float(place - before)
        matrix[x, before] += 1 - after
        matrix[x, min(before + 1, cells - 1)] += after
    return matrix


def formulas(cells, pairs, masks, grad):
    """losses, ∂cells in float64 by the formulas, one pair at a time."""
    cells, grad = cells.detach().double(), grad.double()
    losses, gradient = torch.empty_like(grad), torch.empty_like(cells)
    first = 0
    for pair, (height, width) in enumerate(pairs.sizes):
        mask = masks[pairs.columns.mask[pair].item()]
        here = slice(first, first + height * width)
        first = here.stop
        down, across = weights(mask.shape[0], height), weights(mask.shape[1], width)
        for k in range(len(cells)):
            p = down @ cells[k, here].view(height, width) @ across.t()
            loss, slope = _pixels(p, mask)
            losses[k, pair] = loss.mean()
            gradient[k, here] = (grad[k, pair] * down.t() @ slope @ across / mask.numel()).flatten()
    return losses, gradient


def _pixels(p, mask):
    m = mask.double()
    inside, outside = 1e-6 + (1 - 2e-6) * p, 1e-6 + (1 - 2e-6) * (1 - p)
    return -torch.where(mask, inside, outside).log(), (1 - 2e-6) * ((1 - m) / outside - m / inside)
