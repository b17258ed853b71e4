"""Grounding metrics: does the noun attention lie on the object?

Per pair (one map row, one supervised patch), over the h x w cells of the fused frame map f of `GridPredictions`:

pointing_accuracy
    The pointing game (Zhang et al., "Top-down Neural Attention by Excitation Backprop", arXiv 1608.00507): 1 if the
    map's maximum lies in the mask, read at the pixel under the cell's centre, where the bilinearly upsampled map
    peaks: mask[floor((i + 1/2) Hm / h), floor((j + 1/2) Wm / w)]. No tolerance margin. Cells that tie for the maximum
    share the hit, so that a constant map scores what random pointing would.
mass_in_mask
    The energy-based pointing game (Wang et al., "Score-CAM", arXiv 1910.01279): sum_n m_n f_n / sum_n f_n, m_n the
    masked share of cell n's area.
soft_iou
    sum p m / sum (p + m - p m), with p = (f - min f) / (max f - min f): 1 - the loss's "iou" on the grid (Rahman and
    Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation", ISVC 2016).

All three are per pair: a noun of several tokens has several rows, and each counts. A pair whose mask has no pixel is
left out, also of the number of pairs. p is the min-max prediction, whatever the loss takes, so that runs can be
compared.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from swim_fast.loss.mask_loss import GridPredictions
from swim_fast.options import METRICS
from swim_kernels import grid_metrics


def sum_metrics(predictions: GridPredictions) -> Tensor:
    """Return sums over the pairs, to be added up over batches and ranks before `average_metrics`.

    Returns:
        float64 [4], on the maps' device: sums in the order of `METRICS`, then the number of pairs with a mask; with
        fusion "none" [layers, 4]. Nothing is read back from the device.
    """
    maps, targets = predictions.maps, predictions.targets
    shares, centres = targets.cell_shares(maps[0].dtype), targets.cell_targets[1]
    how = {"fusion": predictions.fusion, "backend": predictions.backend}
    sums = grid_metrics(maps, targets.pairs, shares, centres, **how).sum(1, dtype=torch.float64)
    return sums if predictions.fusion == "none" else sums[0]


def average_metrics(sums: Tensor, names: Iterable[str] = METRICS) -> dict[str, float]:
    """Return the mean of each metric over the pairs, which the last of the sums counts; NaN without pairs.

    Args:
        sums: [len(names) + 1], as `sum_metrics` and `sum_ranking_metrics` have them. Waits for their device.
        names: the metrics in order, `METRICS` or `RANKING_METRICS`.
    """
    *totals, pairs = sums.tolist()
    return {name: total / pairs if pairs else float("nan") for name, total in zip(names, totals, strict=True)}
