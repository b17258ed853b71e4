"""Grid prediction and metrics, eager: the specification. Plain operations, everything materialised, differentiated by
autograd.

Of one pair, with c the cells of its patch and a_l the attention of layer l on them (SWIM, arXiv 2605.18018):

    f_c = 1/layers Σ_l a_l,c    fusion "mean" (Eq. 6)
          Σ_l a_l,c             "add"
          Π_l a_l,c             "product"
          a_l,c                 "none", each layer for itself

    p_c = f_c                                   prediction "probability" (Eq. 7); "add" ends at 1
          (f_c − min f) / (max f − min f)       "min_max"

"min_max" is the limit of the released code's p in which its two epsilons go to 0. It is computed from log f with the
patch's maximum subtracted, so that neither the product of many small probabilities nor the number of columns matters;
"mean" and "add" are the same. Where the limit needs a decision:

* An attention below `finfo.tiny / finfo.eps` (1e-31 in fp32), 0 too, counts as that floor and gets no gradient. It
  could not use one: the softmax behind the map multiplies by that same probability. The floor stands 1/eps above the
  smallest normal number, so that ∂log a = 1/a times an upstream gradient does not overflow.
* A constant patch (a 1 x 1 grid is one) has p = 0, the limit of 0 / (0 + eps), and no gradient.
* The cells at the patch's minimum and maximum are p = 0 and p = 1 whatever f is; p has no gradient there. It is cut
  explicitly: what arrives there may be large (a cross-entropy's slope of 1e6), and would have to cancel.
* Cells that tie at the minimum or maximum share what min f and max f get evenly.
* p is what a min-max makes of f: its gradient grows as the patch flattens, like 1 / (max − min).
* A NaN in a patch makes all of its p NaN.

`grid_metrics` compares f with the mask, of which cell c has the share m_c of its area and the pixel z_c ∈ {0, 1} under
its centre:

    hit  = Σ_(c at max f) z_c / number of cells at max f
    mass = Σ m f / Σ f
    iou  = Σ p m / Σ (p + m − p m)              p of "min_max"

from the same log f, so that none depends on the scale of f. A NaN in a patch makes all three NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swim_kernels.runtime.numerics import compute_dtype
from swim_kernels.structs.grid_pairs import GridPairs

FUSIONS = ("mean", "add", "product", "none")
PREDICTIONS = ("probability", "min_max")


def grid_prediction_eager(maps: Sequence[Tensor], pairs: GridPairs, fusion: str, prediction: str) -> Tensor:
    """Return p [1 or layers, M]; arguments as `grid_prediction`, already checked.

    Computed and returned in float64 for float64 maps, in float32 for all others.
    """
    a = _gather_cells(maps, pairs)
    if prediction == "probability":
        return fuse(a, fusion)
    p = [
        min_max(log_fused(a[:, cells].unflatten(1, (-1, *size)), fusion)).flatten(1) for _, cells, size in pairs.runs()
    ]
    return torch.cat(p, dim=1) if p else a[: num_predictions(maps, fusion)]


def grid_metrics_eager(
    maps: Sequence[Tensor], pairs: GridPairs, shares: Tensor, centres: Tensor, fusion: str
) -> Tensor:
    """Return (hit, mass, iou, 1) of every pair [1 or layers, P, 4], zeros where its mask has no pixel; arguments as
    `grid_metrics`, already checked.

    Computed and returned in float64 for float64 maps, in float32 for all others.
    """
    a = _gather_cells(maps, pairs)
    metrics = a.new_empty(num_predictions(maps, fusion), len(pairs), 4)
    for run, cells, size in pairs.runs():
        log_f = log_fused(a[:, cells].unflatten(1, (-1, *size)), fusion)
        share, centre = (values[cells].to(a.dtype).unflatten(0, (-1, *size)) for values in (shares, centres))
        metrics[:, run] = _compare(log_f, share, centre)
    return metrics


def _compare(log_f: Tensor, share: Tensor, centre: Tensor) -> Tensor:
    """Return the metrics [K, P, 4] of patches [K, P, h, w] against their targets [P, h, w]."""
    frame = (-2, -1)
    p, high = min_max(log_f), log_f.amax(frame, keepdim=True)
    f, peak = (log_f - high).exp(), log_f == high
    hit = (peak * centre).sum(frame) / peak.sum(frame)
    mass = (f * share).sum(frame) / f.sum(frame)
    common, area = (p * share).sum(frame), share.sum(frame)
    iou = common / (p.sum(frame) + area - common)
    return torch.where((area > 0)[:, None], torch.stack([hit, mass, iou, torch.ones_like(mass)], dim=-1), 0)


def _gather_cells(maps: Sequence[Tensor], pairs: GridPairs) -> Tensor:
    """Return a [layers, M] in the dtype of the computation."""
    dtype = compute_dtype(maps[0].dtype)
    rows, columns = pairs.cells
    # index_select, whose gradient is summed in a fixed order on the CPU where pairs share columns
    index = rows * maps[0].shape[1] + columns
    return torch.stack([layer.to(dtype).reshape(-1).index_select(0, index) for layer in maps])


def num_predictions(maps: Sequence[Tensor], fusion: str) -> int:
    """Return the number of predictions of a cell: one, or one per layer."""
    return len(maps) if fusion == "none" else 1


def floor_of(dtype: torch.dtype) -> float:
    """Return the floor: the least attention that is not raised."""
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def fuse(a: Tensor, fusion: str) -> Tensor:
    """Return f [1 or layers, ...] of a [layers, ...], at most 1."""
    if fusion == "none":
        return a
    if fusion == "product":
        return a.prod(0, keepdim=True)
    total = a.sum(0, keepdim=True)
    return total / len(a) if fusion == "mean" else torch.where(total > 1, 1, total)


def log_fused(a: Tensor, fusion: str) -> Tensor:
    """Return log f of every patch, up to a constant per patch.

    Args:
        a: [layers, ..., h, w] fp32 or float64.
        fusion: one of `FUSIONS`.

    Returns:
        [1, ..., h, w], for "none" [layers, ..., h, w].
    """
    if fusion in ("mean", "add"):
        a = a.mean(0, keepdim=True)
    a = a.clamp_min(floor_of(a.dtype))
    # Divided by the patch's maximum first: log of a ratio near 1 keeps the digits that log a − log max would lose. The
    # divisor is detached, since p does not change when f is scaled.
    log_f = (a / a.detach().amax((-2, -1), keepdim=True)).log()
    return log_f.sum(0, keepdim=True) if fusion == "product" else log_f


def min_max(log_f: Tensor) -> Tensor:
    """Return p of every patch [..., h, w] from log f, same shape: exactly 0 at the minimum and on a constant patch, 1
    at the maximum."""
    low, high = log_f.amin((-2, -1), keepdim=True), log_f.amax((-2, -1), keepdim=True)
    # f − min f = f (1 − exp(log min f − log f)): no digit is lost, neither where f is tiny nor on a flat patch.
    spread = (low - high).expm1()
    p = (log_f - high).exp() * (low - log_f).expm1() / torch.where(spread == 0, 1, spread)
    p = torch.where(log_f == high, 1, p)
    return torch.where(log_f == low, 0, p)
