"""Mask BCE in Triton: launches of the kernels in `kernels.py`.

    losses, with or without the gradient of the cells   2 launches, for all pairs
    backward                                            none: the gradient times what arrives, by torch

Nothing is read back from the device, and grids follow from shapes.
"""

from __future__ import annotations

import triton
from torch import Tensor

from swim_kernels.mask_bce.torch_backend import apply_with_gradient
from swim_kernels.mask_bce.triton import kernels
from swim_kernels.runtime.launch import launch
from swim_kernels.structs.grid_pairs import GridPairs
from swim_kernels.structs.packed_masks import PackedMasks

# One configuration for all. A band of a 720p mask over a usual grid has some 40 pixels.
COLUMNS, PIXELS, NUM_WARPS, NUM_STAGES = 16, 16, 4, 1
COMBINE_BLOCK, COMBINE_WARPS = 256, 4  # cells


def mask_bce_triton(cells: Tensor, pairs: GridPairs, masks: PackedMasks) -> Tensor:
    """Return losses [K, P] fp32; arguments as `mask_bce`, already checked, fp32. No double backward."""
    return apply_with_gradient(compute_losses, cells, pairs, masks)


def compute_losses(cells: Tensor, pairs: GridPairs, masks: PackedMasks, want: bool) -> tuple[Tensor, Tensor | None]:
    """Return losses [K, P] and, if wanted, d loss / d cell [K, M]."""
    num_sets, num_cells = cells.shape
    losses = cells.new_empty(num_sets, len(pairs))
    gradient = cells.new_empty(num_sets, num_cells) if want else None
    if not cells.numel():
        return losses, gradient
    partials = cells.new_empty(5 if want else 1, num_sets, num_cells)
    arguments = {"table": pairs.table, "mask_table": masks.table, "partials": partials, "WANT_GRADIENT": want}
    arguments |= {"num_cells": num_cells, "num_sets": num_sets, "num_masks": len(masks), "num_stages": NUM_STAGES}
    blocks = triton.cdiv(max(width for _, width in pairs.sizes), COLUMNS)
    launch(
        kernels.bands_kernel,
        (len(pairs), max(height for height, _ in pairs.sizes), blocks * num_sets),
        **arguments,
        cells=cells.contiguous(),
        bits=masks.bits,
        COLUMNS=COLUMNS,
        PIXELS=PIXELS,
        num_warps=NUM_WARPS,
    )
    launch(
        kernels.combine_kernel,
        (len(pairs), num_sets),
        **arguments,
        losses=losses,
        gradient=gradient,
        BLOCK=COMBINE_BLOCK,
        num_warps=COMBINE_WARPS,
    )
    return losses, gradient
