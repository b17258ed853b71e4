"""The public op: checks its arguments, chooses the backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swim_kernels.grid_prediction.reference import FUSIONS, grid_prediction_eager
from swim_kernels.grid_prediction.torch_backend import grid_prediction_torch
from swim_kernels.runtime import backends
from swim_kernels.runtime.numerics import no_autocast
from swim_kernels.structs.grid_pairs import FIELDS, GridPairs

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def grid_prediction(
    maps: Sequence[Tensor], pairs: GridPairs, *, fusion: str = "product", backend: str = "auto"
) -> Tensor:
    """The min-max normalised prediction of each pair's frame from attention maps of several layers, differentiable.

    p = (f − min f) / (max f − min f) per frame, f the fusion of the layers (arXiv 2605.18018, without its epsilons);
    equations, and what happens in their limits, in `reference.py`, which is the specification.

    Args:
        maps: one [R, N] per layer, non-negative, all of one shape, device and dtype (bf16, fp16, fp32 or fp64); any
            strides. bf16 and fp16 are computed in fp32.
        pairs: P pairs on the same device; the frame of a pair is `maps[l][row, start : start + h * w]`. Two pairs may
            read the same columns, their gradients add up. On the CPU rows and columns are checked; on an accelerator
            nothing is read back.
        fusion: f = "product" over layers of a, "mean" over layers, or "none": each layer for itself.
        backend: "eager" (the reference, differentiated by autograd), "torch" (gradient by its formula, keeps nothing
            but the maps, any device), "triton" (CUDA, or CPU tensors in Triton's interpreter; fp32 maps), or "auto":
            triton on CUDA where it can run, else torch.

    Returns:
        [1, M] fp32 (fp64 for fp64 maps), M = Σ h · w, the cells in the order of the pairs; for "none" [layers, M].
        With P = 0 it is empty, and backward gives zeros.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: no map; shapes or devices that do not go together; an unknown fusion or backend.
        IndexError: a frame outside the maps (CPU); the pair is named.
        RuntimeError: a backend that is not available here.
    """
    maps = _checked_maps(maps)
    _check_pairs(pairs, maps[0])
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}: choose one of {', '.join(FUSIONS)}")
    device_type = maps[0].device.type
    implementation = _implementation(choose_backend(backend, device_type, maps[0].dtype))
    with no_autocast(device_type):
        return implementation(maps, pairs, fusion)


def choose_backend(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """`backends.choose_backend` for such maps."""
    missing = functools.partial(_triton_missing, device_type, dtype)
    return backends.choose_backend("grid prediction", backend, device_type, missing)


def _triton_missing(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run on such maps; None if it can."""
    reason = backends.triton_missing(device_type)
    if reason is None and dtype != torch.float32:
        return f"it takes float32 maps, not {str(dtype).removeprefix('torch.')}"
    return reason


def _implementation(backend: str) -> Callable[..., Tensor]:
    if backend == "triton":  # imported where it is used: TRITON_INTERPRET is read when kernels are defined
        from swim_kernels.grid_prediction.triton.launch import grid_prediction_triton

        return grid_prediction_triton
    return {"eager": grid_prediction_eager, "torch": grid_prediction_torch}[backend]


def _checked_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    maps = list(maps)
    if not maps:
        raise ValueError("no attention map: at least one layer's [R, N] is needed")
    for number, layer in enumerate(maps):
        if not isinstance(layer, Tensor):
            raise TypeError(f"maps[{number}] must be a tensor [R, N], got {type(layer).__name__}")
        if layer.dtype not in _DTYPES:
            raise TypeError(f"maps[{number}] must be bfloat16, float16, float32 or float64, got {layer.dtype}")
        if layer.ndim != 2 or layer.shape != maps[0].shape:
            raise ValueError(
                f"maps[{number}] has shape {list(layer.shape)}, maps[0] {list(maps[0].shape)}: "
                "one [R, N] per layer, all of one shape"
            )
        if layer.dtype != maps[0].dtype:
            raise TypeError(f"maps[{number}] is {layer.dtype}, maps[0] is {maps[0].dtype}: cast one of them")
        if layer.device != maps[0].device:
            raise ValueError(f"maps[{number}] is on {layer.device}, maps[0] on {maps[0].device}")
    return maps


def _check_pairs(pairs: GridPairs, layer: Tensor) -> None:
    """Everything that can be known without waiting for the device; on the CPU the frames as well."""
    if not isinstance(pairs, GridPairs):
        raise TypeError(f"pairs must be GridPairs, got {type(pairs).__name__}")
    if pairs.table.shape != (len(pairs), FIELDS) or pairs.table.dtype != torch.int32:
        raise ValueError(
            f"pairs.table must be int32 [P, {FIELDS}] for {len(pairs)} pairs, "
            f"got {pairs.table.dtype} {list(pairs.table.shape)}"
        )
    if pairs.device != layer.device:
        raise ValueError(f"maps are on {layer.device}, pairs on {pairs.device}: move them with pairs.to(device)")
    if pairs.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_frames(pairs, *layer.shape)


def _check_frames(pairs: GridPairs, num_rows: int, num_columns: int) -> None:
    row, start, height, width = pairs.table[:, :4].long().unbind(1)
    end = start + height * width
    outside = (row < 0) | (row >= num_rows) | (start < 0) | (end > num_columns)
    if outside.any():
        pair = int(outside.nonzero()[0])
        raise IndexError(
            f"pair {pair} reads columns [{int(start[pair])}, {int(end[pair])}) of row {int(row[pair])}: "
            f"outside maps of {num_rows} rows and {num_columns} columns"
        )
