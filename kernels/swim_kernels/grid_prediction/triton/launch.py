"""Grid prediction in Triton: launches of the kernels in `kernels.py`.

    p           1 launch
    ∂ of maps   1, besides one fill of them with zeros; where pairs may share columns, the cells' gradients are added to
                the maps by torch, in a fixed order
    metrics     1

Nothing is read back from the device, and grids follow from shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swim_kernels.grid_prediction.reference import num_predictions
from swim_kernels.grid_prediction.torch_backend import GridPrediction, scatter_cells
from swim_kernels.grid_prediction.triton import kernels
from swim_kernels.runtime.launch import launch
from swim_kernels.structs.grid_pairs import GridPairs

# One configuration for all. BLOCK: cells of a patch at a time; with 1024 ptxas spills a register in some builds.
BLOCK, NUM_WARPS, NUM_STAGES = 512, 8, 1


def grid_prediction_triton(maps: Sequence[Tensor], pairs: GridPairs, fusion: str, prediction: str) -> Tensor:
    """Return p [1 or layers, M] fp32; arguments as `grid_prediction`, already checked, fp32.

    Keeps the maps for backward, no copies. No double backward.
    """
    return GridPrediction.apply(predict, gradients, pairs, (fusion, prediction), *maps)


def predict(maps: Sequence[Tensor], pairs: GridPairs, fusion: str, prediction: str) -> Tensor:
    """Return p [1 or layers, M]."""
    p = maps[0].new_empty(num_predictions(maps, fusion), pairs.num_cells)
    if prediction == "probability":
        kernel, variant = kernels.fusion_kernel, {"FUSION": fusion}
    else:
        kernel, variant = kernels.prediction_kernel, {"MEAN": fusion in ("mean", "add")}
    _run(kernel, maps, pairs, fusion, p=p, **variant)
    return p


def gradients(grad_p: Tensor, maps: Sequence[Tensor], pairs: GridPairs, fusion: str, prediction: str) -> list[Tensor]:
    """Return ∂ of every layer [R, N]."""
    dense = pairs.disjoint
    shape = tuple(maps[0].shape) if dense else (pairs.num_cells,)
    # patches fill only a part of the maps, but all of the cells
    grad = (torch.zeros if dense else torch.empty)(len(maps), *shape, dtype=torch.float32, device=grad_p.device)
    arguments = {"grad_p": grad_p.contiguous(), "grad_maps": grad, "DENSE": dense}
    arguments |= {"out_layer_stride": grad.stride(0), "out_row_stride": grad.stride(1) if dense else 0}
    if prediction == "probability":
        kernel, variant = kernels.fusion_gradient_kernel, {"FUSION": fusion}
    else:
        kernel, variant = kernels.gradient_kernel, {"MEAN": fusion in ("mean", "add")}
    _run(kernel, maps, pairs, fusion, **arguments, **variant)
    return list(grad) if dense else scatter_cells(grad, maps, pairs)


def grid_metrics_triton(
    maps: Sequence[Tensor], pairs: GridPairs, shares: Tensor, centres: Tensor, fusion: str
) -> Tensor:
    """Return (hit, mass, iou, 1) of every pair [1 or layers, P, 4] fp32; arguments as `grid_metrics`, already checked,
    maps fp32."""
    count = num_predictions(maps, fusion)
    metrics = maps[0].new_empty(count, len(pairs), 4)
    arguments = {"shares": shares.float().contiguous(), "centres": centres.float().contiguous(), "metrics": metrics}
    scratch = maps[0].new_empty(count, pairs.num_cells)
    mean = fusion in ("mean", "add")
    _run(kernels.metrics_kernel, maps, pairs, fusion, **arguments, log_f=scratch, MEAN=mean)
    return metrics


def _run(kernel, maps: Sequence[Tensor], pairs: GridPairs, fusion: str, **arguments) -> None:
    if not len(pairs):
        return
    if any(layer.stride() != maps[0].stride() for layer in maps):
        maps = [layer.contiguous() for layer in maps]
    launch(
        kernel,
        (len(pairs), num_predictions(maps, fusion)),
        **arguments,
        table=pairs.table,
        maps=tuple(maps),
        row_stride=maps[0].stride(0),
        column_stride=maps[0].stride(1),
        num_cells=pairs.num_cells,
        SEPARATE=fusion == "none",
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
