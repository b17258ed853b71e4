"""The public ops: check their arguments and dispatch to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swim_kernels.grid_prediction.reference import (
    FUSIONS,
    PREDICTIONS,
    grid_metrics_eager,
    grid_prediction_eager,
)
from swim_kernels.grid_prediction.torch_backend import grid_prediction_torch
from swim_kernels.runtime.backends import Op
from swim_kernels.runtime.numerics import check_floating
from swim_kernels.structs.grid_pairs import GridPairs, check_pairs


def _import_triton() -> Callable[..., Tensor]:
    from swim_kernels.grid_prediction.triton.launch import grid_prediction_triton

    return grid_prediction_triton


def _import_triton_metrics() -> Callable[..., Tensor]:
    from swim_kernels.grid_prediction.triton.launch import grid_metrics_triton

    return grid_metrics_triton


def _refuse_triton(dtype: torch.dtype = torch.float32) -> str | None:
    return None if dtype == torch.float32 else f"it takes float32 maps, not {str(dtype).removeprefix('torch.')}"


OP = Op(
    "grid prediction",
    eager=grid_prediction_eager,
    torch=grid_prediction_torch,
    import_triton=_import_triton,
    refuse=_refuse_triton,
)
METRICS_OP = Op(
    "grid metrics",
    eager=grid_metrics_eager,
    torch=grid_metrics_eager,  # it has no gradient whose memory could be saved
    import_triton=_import_triton_metrics,
    refuse=_refuse_triton,
)


def grid_prediction(
    maps: Sequence[Tensor],
    pairs: GridPairs,
    *,
    fusion: str = "mean",
    prediction: str = "probability",
    backend: str = "auto",
) -> Tensor:
    """Return the prediction of each pair's patch from attention maps of several layers, differentiable.

    p = f, the fusion of the layers, or (f − min f) / (max f − min f) per patch (arXiv 2605.18018, without its
    epsilons); equations, and what happens in their limits, in `reference.py`, which is the specification.

    Args:
        maps: one [R, N] per layer, non-negative, all of one shape, device and dtype (bf16, fp16, fp32 or fp64); any
            strides. bf16 and fp16 are computed in fp32.
        pairs: P pairs on the same device; the patch of a pair is `maps[l][row, start : start + h * w]`. Two pairs may
            read the same columns, their gradients add up. On the CPU rows and columns are checked; on an accelerator
            nothing is read back.
        fusion: f = "mean" over layers of a, "add", "product", or "none": each layer for itself.
        prediction: "probability", p = f, or "min_max".
        backend: "eager" (the reference, differentiated by autograd), "torch" (gradient by its formula, keeps nothing
            but the maps, any device), "triton" (CUDA, or CPU tensors in Triton's interpreter; fp32 maps), or "auto":
            triton on CUDA where it can run, else torch.

    Returns:
        [1, M] fp32 (fp64 for fp64 maps), M = Σ h · w, the cells in the order of the pairs; for "none" [layers, M].
        With P = 0 it is empty, and backward gives zeros.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: no map; shapes or devices that do not go together; an unknown fusion, prediction or backend.
        IndexError: a patch outside the maps (CPU); the pair is named.
        RuntimeError: a backend that is not available here.
    """
    maps = _checked_maps(maps, pairs)
    _check_choice("fusion", fusion, FUSIONS)
    _check_choice("prediction", prediction, PREDICTIONS)
    return OP(backend, maps[0].device.type, (maps[0].dtype,), maps, pairs, fusion, prediction)


@torch.no_grad()
def grid_metrics(
    maps: Sequence[Tensor],
    pairs: GridPairs,
    shares: Tensor,
    centres: Tensor,
    *,
    fusion: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return metrics of the fused maps against the masks, pair by pair, without a graph; equations in `reference.py`.

    Args:
        maps, pairs, fusion: as of `grid_prediction`.
        shares: [M] floating, masked share of each cell's area, the cells in the order of the pairs.
        centres: [M] bool or floating, 1 where the pixel under the cell's centre is masked, else 0.
        backend: "eager" (the reference), "torch" (the same), "triton" (CUDA, or CPU tensors in Triton's interpreter;
            fp32 maps; one launch), or "auto": triton on CUDA where it can run, else torch.

    Returns:
        [1, P, 4] fp32 (fp64 for fp64 maps), for "none" [layers, P, 4]: (hit, mass, iou, 1), zeros for a pair whose mask
        has no pixel, so that sums over the pairs are sums and a count.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `grid_prediction`; `shares` or `centres` do not fit.
    """
    maps = _checked_maps(maps, pairs)
    _check_choice("fusion", fusion, FUSIONS)
    for name, values in (("shares", shares), ("centres", centres)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor [M], got {type(values).__name__}")
        if name == "shares" or values.dtype != torch.bool:
            check_floating(name, values)
        if values.shape != (pairs.num_cells,) or values.device != maps[0].device:
            raise ValueError(
                f"{name} must be [{pairs.num_cells}] on {maps[0].device}, one for each cell of the pairs, "
                f"got {list(values.shape)} on {values.device}"
            )
    return METRICS_OP(backend, maps[0].device.type, (maps[0].dtype,), maps, pairs, shares, centres, fusion)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")


def _checked_maps(maps: Sequence[Tensor], pairs: GridPairs) -> list[Tensor]:
    """Return the maps as a list, after the checks of maps and pairs that need no value of a device."""
    maps = list(maps)
    if not maps:
        raise ValueError("no attention map: at least one layer's [R, N] is needed")
    for number, layer in enumerate(maps):
        if not isinstance(layer, Tensor):
            raise TypeError(f"maps[{number}] must be a tensor [R, N], got {type(layer).__name__}")
        check_floating(f"maps[{number}]", layer)
        if layer.ndim != 2 or layer.shape != maps[0].shape:
            raise ValueError(
                f"maps[{number}] has shape {list(layer.shape)}, maps[0] {list(maps[0].shape)}: "
                "one [R, N] per layer, all of one shape"
            )
        if layer.dtype != maps[0].dtype:
            raise TypeError(f"maps[{number}] is {layer.dtype}, maps[0] is {maps[0].dtype}: cast one of them")
        if layer.device != maps[0].device:
            raise ValueError(f"maps[{number}] is on {layer.device}, maps[0] on {maps[0].device}")
    check_pairs(pairs, "maps", maps[0].device)
    if pairs.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_frames(pairs, *maps[0].shape)
    return maps


def _check_frames(pairs: GridPairs, num_rows: int, num_columns: int) -> None:
    row, start, height, width, *_ = (column.long() for column in pairs.columns)
    end = start + height * width
    outside = (row < 0) | (row >= num_rows) | (start < 0) | (end > num_columns)
    if outside.any():
        pair = int(outside.nonzero()[0])
        raise IndexError(
            f"pair {pair} reads columns [{int(start[pair])}, {int(end[pair])}) of row {int(row[pair])}: "
            f"outside maps of {num_rows} rows and {num_columns} columns"
        )
