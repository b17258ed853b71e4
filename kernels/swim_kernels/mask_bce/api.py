"""The public op: checks its arguments and dispatches to a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swim_kernels.mask_bce.reference import mask_bce_eager
from swim_kernels.mask_bce.torch_backend import mask_bce_torch
from swim_kernels.runtime.backends import Op
from swim_kernels.runtime.numerics import check_floating, compute_dtype
from swim_kernels.structs.grid_pairs import GridPairs, check_pairs
from swim_kernels.structs.packed_masks import PackedMasks


def _import_triton() -> Callable[..., Tensor]:
    from swim_kernels.mask_bce.triton.launch import mask_bce_triton

    return mask_bce_triton


def _refuse_triton(dtype: torch.dtype = torch.float32) -> str | None:
    return "it has no float64" if dtype == torch.float64 else None


OP = Op(
    "mask BCE",
    eager=mask_bce_eager,
    torch=mask_bce_torch,
    import_triton=_import_triton,
    refuse=_refuse_triton,
)


def mask_bce(cells: Tensor, pairs: GridPairs, masks: PackedMasks, *, backend: str = "auto") -> Tensor:
    """Return the binary cross-entropy between each pair's prediction, upsampled to its mask's size, and the mask.

    The mean over the mask's pixels; bilinear, half-pixel centres, `align_corners=False`; differentiable. Equations in
    `reference.py`, which is the specification. Only the gradient of the cells is kept for backward, computed together
    with the losses.

    Args:
        cells: [K, M] predictions in [0, 1], K independent sets of them; M = `pairs.num_cells`, the cells of the pairs
            in order. bf16, fp16, fp32 or fp64; any strides. bf16 and fp16 are computed in fp32.
        pairs: P pairs on the same device: their grids, and the index of each one's mask. On the CPU these indices are
            checked; on an accelerator nothing is read back ("eager" and "torch" need them, see
            `GridPairs.mask_indices`).
        masks: on the same device; several pairs may share one.
        backend: "eager" (the reference, materialises everything), "torch" (pixels in chunks, any device), "triton"
            (CUDA, or CPU tensors in Triton's interpreter; not fp64), or "auto": triton on CUDA where it can run, else
            torch.

    Returns:
        Losses [K, P] fp32 (fp64 for fp64 cells); NaN for a pair with a NaN among its cells. With P = 0 or K = 0 they
        are empty, and backward gives zeros.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes, devices or values that do not go together; an unknown backend.
        RuntimeError: a backend that is not available here.
    """
    _check_arguments(cells, pairs, masks)
    computed = cells.to(compute_dtype(cells.dtype))
    return OP(backend, cells.device.type, (cells.dtype,), computed, pairs, masks)


def _check_arguments(cells: Tensor, pairs: GridPairs, masks: PackedMasks) -> None:
    """Check all that can be known without waiting for the device; on the CPU the indices of the masks as well."""
    if not isinstance(cells, Tensor):
        raise TypeError(f"cells must be a tensor [K, M], got {type(cells).__name__}")
    if not isinstance(masks, PackedMasks):
        raise TypeError(f"masks must be PackedMasks, got {type(masks).__name__}: use PackedMasks.pack(masks)")
    check_floating("cells", cells)
    check_pairs(pairs, "cells", cells.device)
    if cells.ndim != 2 or cells.shape[1] != pairs.num_cells:
        raise ValueError(f"cells must be [K, M] with M = {pairs.num_cells} cells, got shape {list(cells.shape)}")
    if masks.device != cells.device:
        raise ValueError(f"cells are on {cells.device}, masks on {masks.device}: move them with masks.to(device)")
    if len(pairs) and not len(masks):
        raise ValueError(f"{len(pairs)} pairs, but no mask")
    if cells.device.type == "cpu" and not torch.compiler.is_compiling():
        for pair, index in enumerate(pairs.mask_indices):
            if not 0 <= index < len(masks):
                raise ValueError(f"pair {pair} asks for mask {index} of {len(masks)}")
