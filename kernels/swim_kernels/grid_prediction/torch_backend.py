"""Grid prediction in torch operations, on any device: nothing is kept for backward but the maps themselves.

The gradient by its formula. Of prediction "probability", with G what arrives at p:

    ∂a_l       = G / layers                        "mean"
                 G                                 "add", 0 where the sum is above 1; "none"
                 G · Π_k≠l a_k                     "product"

Of "min_max", with u = log f − max log f, F = e^u, m = e^(min log f − max log f), G what arrives at p, of
which nothing counts at the minimum and the maximum, and sums over the cells of a frame:

    p_c        = (F_c − m) / (1 − m)                1 − p_c = (1 − F_c) / (1 − m)
    ∂log f_c   = G_c F_c / (1 − m)                  between the extremes
    ∂log f_min = −(Σ G_c (1 − p_c)) m / (1 − m)     shared evenly by the cells at the minimum
    ∂log f_max = −(Σ G_c p_c) / (1 − m)             … at the maximum
    ∂a_l       = ∂log f / a_l                       "product", "none"; 0 below the floor
    ∂a_l       = ∂log f / (layers · mean a)         "mean", "add"; 0 where the mean is below the floor

1 − m and 1 − F_c are taken from expm1, so that they keep their digits on a nearly flat frame. Deterministic: where
pairs share columns, their gradients are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swim_kernels.grid_prediction.reference import floor_of, fuse, log_fused, min_max, num_predictions
from swim_kernels.runtime.numerics import add_at, compute_dtype, no_autocast
from swim_kernels.structs.grid_pairs import GridPairs


def grid_prediction_torch(maps: Sequence[Tensor], pairs: GridPairs, fusion: str, prediction: str) -> Tensor:
    """Return p [1 or layers, M]; arguments as `grid_prediction`, already checked.

    Computed and returned in float64 for float64 maps, in float32 for all others. No double backward.
    """
    return GridPrediction.apply(predict, gradients, pairs, (fusion, prediction), *maps)


class GridPrediction(torch.autograd.Function):
    """The node of the backends that compute the gradient themselves.

    predict: (maps, pairs, fusion, prediction) -> p
    gradients: (grad_p, maps, pairs, fusion, prediction) -> one gradient per layer, in the layer's shape and dtype
    how: fusion and prediction
    """

    @staticmethod
    def forward(
        ctx, predict: Callable, gradients: Callable, pairs: GridPairs, how: tuple[str, str], *maps: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pairs.table, *maps)  # the table too, so that a change to it is noticed
        ctx.gradients, ctx.pairs, ctx.how = gradients, pairs, how
        return predict(maps, pairs, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_p):
        if grad_p is None:
            return (None,) * len(ctx.needs_input_grad)
        _, *maps = ctx.saved_tensors
        with no_autocast(grad_p.device.type):
            grad_maps = ctx.gradients(grad_p, maps, ctx.pairs, *ctx.how)
        return None, None, None, None, *grad_maps


def predict(maps: Sequence[Tensor], pairs: GridPairs, fusion: str, prediction: str) -> Tensor:
    """Return p [1 or layers, M]."""
    a = _cells_of(maps, pairs)
    if prediction == "probability":
        return fuse(a, fusion)
    p = a.new_empty(num_predictions(maps, fusion), pairs.num_cells)
    for _, cells, size in pairs.runs():
        p[:, cells] = min_max(log_fused(a[:, cells].unflatten(1, (-1, *size)), fusion)).flatten(1)
    return p


def gradients(grad_p: Tensor, maps: Sequence[Tensor], pairs: GridPairs, fusion: str, prediction: str) -> list[Tensor]:
    """Return ∂ of every layer [R, N], in its dtype."""
    if prediction == "probability" and fusion in ("mean", "none"):  # needs no map
        share = len(maps) if fusion == "mean" else 1
        return scatter_cells((grad_p / share).expand(len(maps), -1), maps, pairs)
    a = _cells_of(maps, pairs)
    if prediction == "probability":
        if fusion == "add":
            grad = torch.where(a.sum(0, keepdim=True) > 1, 0, grad_p).expand_as(a)
        else:
            grad = torch.stack([grad_p[0] * torch.cat([a[:layer], a[layer + 1 :]]).prod(0) for layer in range(len(a))])
        return scatter_cells(grad, maps, pairs)
    grad_a = torch.empty_like(a)
    for _, cells, size in pairs.runs():
        frames, grad = (values[:, cells].unflatten(1, (-1, *size)) for values in (a, grad_p))
        grad = _min_max_gradient(grad, log_fused(frames, fusion))
        grad_a[:, cells] = _fusion_gradient(grad, frames, fusion).flatten(1)
    return scatter_cells(grad_a, maps, pairs)


def scatter_cells(values: Tensor, maps: Sequence[Tensor], pairs: GridPairs) -> list[Tensor]:
    """Write values [layers, M] of the cells, or where pairs may share columns add them, to zeros like every layer."""
    rows, columns = pairs.cells
    if pairs.disjoint:
        out = [torch.zeros_like(layer) for layer in maps]
        for grad, cells in zip(out, values, strict=True):
            grad.index_put_((rows, columns), cells.to(grad.dtype))
        return out
    num_rows, num_columns = maps[0].shape
    index = rows * num_columns + columns
    sums = values.new_zeros(len(maps), num_rows * num_columns)
    for total, cells in zip(sums, values, strict=True):
        add_at(total, index, cells)
    return [total.view(num_rows, num_columns).to(maps[0].dtype) for total in sums]


def _cells_of(maps: Sequence[Tensor], pairs: GridPairs) -> Tensor:
    """Return a [layers, M] in the dtype of the computation."""
    rows, columns = pairs.cells
    a = maps[0].new_empty(len(maps), len(rows), dtype=compute_dtype(maps[0].dtype))
    for cells, layer in zip(a, maps, strict=True):
        cells.copy_(layer[rows, columns])
    return a


def _min_max_gradient(grad_p: Tensor, log_f: Tensor) -> Tensor:
    """Return ∂log f of `min_max`, both [..., h, w]."""
    frame = (-2, -1)
    low, high = log_f.amin(frame, keepdim=True), log_f.amax(frame, keepdim=True)
    is_low, is_high = log_f == low, log_f == high
    spread = -(low - high).expm1()  # 1 − m
    spread = torch.where(spread == 0, 1, spread)  # a constant frame: nothing lies between the extremes
    grad = torch.where(is_low | is_high, 0, grad_p)
    rest = -(log_f - high).expm1() / spread  # 1 − p
    at_low = -(grad * rest).sum(frame, keepdim=True) * (low - high).exp() / spread
    at_high = -(grad * min_max(log_f)).sum(frame, keepdim=True) / spread
    grad = grad * (log_f - high).exp() / spread
    grad = torch.where(is_low, at_low / is_low.sum(frame, keepdim=True), grad)
    return torch.where(is_high, at_high / is_high.sum(frame, keepdim=True), grad)


def _fusion_gradient(grad_log_f: Tensor, a: Tensor, fusion: str) -> Tensor:
    """Return ∂a [layers, P, h, w] of `log_fused`."""
    floor = floor_of(a.dtype)
    if fusion in ("mean", "add"):
        mean = a.mean(0, keepdim=True)
        return torch.where(mean >= floor, grad_log_f / (len(a) * mean), 0).expand_as(a)
    return torch.where(a >= floor, grad_log_f / a, 0)
