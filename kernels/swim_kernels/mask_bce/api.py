"""The public op: checks its arguments, chooses the backend."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from swim_kernels.mask_bce.reference import mask_bce_eager
from swim_kernels.mask_bce.torch_backend import mask_bce_torch
from swim_kernels.runtime import backends
from swim_kernels.runtime.numerics import no_autocast
from swim_kernels.structs import grid_pairs
from swim_kernels.structs.grid_pairs import GridPairs
from swim_kernels.structs.packed_masks import PackedMasks

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def mask_bce(cells: Tensor, pairs: GridPairs, masks: PackedMasks, *, backend: str = "auto") -> Tensor:
    """Binary cross-entropy between each pair's prediction, upsampled to its mask's size, and the mask; differentiable.

    The mean over the mask's pixels; bilinear, half-pixel centres, `align_corners=False`. Equations in `reference.py`,
    which is the specification. Only the gradient of the cells is kept for backward, computed together with the losses.

    Args:
        cells: [K, M] predictions in [0, 1], K independent sets of them; M = `pairs.num_cells`, the cells of the pairs
            in order. bf16, fp16, fp32 or fp64; any strides. bf16 and fp16 are computed in fp32.
        pairs: P pairs on the same device: their grids, and the number of each one's mask. On the CPU these numbers are
            checked; on an accelerator nothing is read back ("eager" and "torch" need them, see
            `GridPairs.mask_numbers`).
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
    implementation = _implementation(choose_backend(backend, cells.device.type, cells.dtype))
    with no_autocast(cells.device.type):
        if cells.dtype != torch.float64:
            cells = cells.float()
        return implementation(cells, pairs, masks)


def choose_backend(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """`backends.choose_backend` for such cells."""
    missing = functools.partial(_triton_missing, device_type, dtype)
    return backends.choose_backend("mask BCE", backend, device_type, missing)


def _triton_missing(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run on such cells; None if it can."""
    return backends.triton_missing(device_type) or ("it has no float64" if dtype == torch.float64 else None)


def _implementation(backend: str) -> Callable[..., Tensor]:
    if backend == "triton":  # imported where it is used: TRITON_INTERPRET is read when kernels are defined
        from swim_kernels.mask_bce.triton.launch import mask_bce_triton

        return mask_bce_triton
    return {"eager": mask_bce_eager, "torch": mask_bce_torch}[backend]


def _check_arguments(cells: Tensor, pairs: GridPairs, masks: PackedMasks) -> None:
    """Everything that can be known without waiting for the device; on the CPU the numbers of the masks as well."""
    if not isinstance(cells, Tensor):
        raise TypeError(f"cells must be a tensor [K, M], got {type(cells).__name__}")
    if not isinstance(pairs, GridPairs):
        raise TypeError(f"pairs must be GridPairs, got {type(pairs).__name__}")
    if not isinstance(masks, PackedMasks):
        raise TypeError(f"masks must be PackedMasks, got {type(masks).__name__}: use PackedMasks.pack(masks)")
    if cells.dtype not in _DTYPES:
        raise TypeError(f"cells must be bfloat16, float16, float32 or float64, got {cells.dtype}")
    if pairs.table.shape != (len(pairs), grid_pairs.FIELDS) or pairs.table.dtype != torch.int32:
        raise ValueError(
            f"pairs.table must be int32 [P, {grid_pairs.FIELDS}] for {len(pairs)} pairs, "
            f"got {pairs.table.dtype} {list(pairs.table.shape)}"
        )
    if cells.ndim != 2 or cells.shape[1] != pairs.num_cells:
        raise ValueError(f"cells must be [K, M] with M = {pairs.num_cells} cells, got shape {list(cells.shape)}")
    for name, value in (("pairs", pairs), ("masks", masks)):
        if value.device != cells.device:
            raise ValueError(f"cells are on {cells.device}, {name} on {value.device}: move them with {name}.to(device)")
    if len(pairs) and not len(masks):
        raise ValueError(f"{len(pairs)} pairs, but no mask")
    if cells.device.type == "cpu" and not torch.compiler.is_compiling():
        for pair, number in enumerate(pairs.mask_numbers):
            if not 0 <= number < len(masks):
                raise ValueError(f"pair {pair} asks for mask {number} of {len(masks)}")
