"""Mask BCE, eager: the specification. Plain operations, everything materialised, differentiated by autograd.

Of one pair, with c [h, w] its cells, m [H, W] its mask of zeros and ones, and u the prediction at the mask's resolution
(bilinear, half-pixel centres, `align_corners=False`, no antialiasing, also where the mask is smaller than the grid):

    y     = max((Y + 1/2) h / H - 1/2, 0)       pixel row Y in units of cells; its cells are ⌊y⌋ and min(⌊y⌋ + 1, h - 1)
    u     = Σ over these and the same in x of weight · c
    loss  = mean over the pixels of -log(1e-6 + (1 - 2e-6) (m u + (1 - m)(1 - u)))

The margin is put on 1 - u where the mask is 0, not on u: 1 less the mapped u would lose its digits.

A NaN among the cells of a pair makes its loss NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from swim_kernels.structs.grid_pairs import GridPairs
from swim_kernels.structs.packed_masks import PackedMasks

MARGIN = 1e-6

Key = TypeVar("Key", bound=Hashable)


def mask_bce_eager(cells: Tensor, pairs: GridPairs, masks: PackedMasks) -> Tensor:
    """Return losses [K, P]; arguments as `mask_bce`, already checked, fp32 or float64.

    Takes memory for several times K × P × H × W values.
    """
    if not cells.numel():
        return cells[:, : len(pairs)]
    indices, frames = pairs.mask_indices, split_pairs(cells, pairs)
    losses = [cells] * len(pairs)
    groups = group_pairs(pairs, lambda pair: (pairs.sizes[pair], masks.sizes[indices[pair]]))
    for (grid, size), members in groups.items():
        p = torch.stack([frames[pair] for pair in members], dim=1).unflatten(2, grid)  # [K, n, h, w]
        p = F.interpolate(p, size=size, mode="bilinear", align_corners=False)
        mask = masks.unpack([indices[pair] for pair in members])
        loss = -(MARGIN + (1 - 2 * MARGIN) * torch.where(mask, p, 1 - p)).log()
        for pair, column in zip(members, loss.mean((-2, -1)).unbind(1), strict=True):
            losses[pair] = column
    return torch.stack(losses, dim=1)


def group_pairs(pairs: GridPairs, key: Callable[[int], Key]) -> dict[Key, list[int]]:
    """Return the indices of the pairs by a key, in the order of first appearance."""
    members: dict[Key, list[int]] = {}
    for pair in range(len(pairs)):
        members.setdefault(key(pair), []).append(pair)
    return members


def split_pairs(cells: Tensor, pairs: GridPairs) -> tuple[Tensor, ...]:
    """Return views [K, h · w] of cells [K, M], pair by pair."""
    return cells.split([height * width for height, width in pairs.sizes], dim=1)
