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

from swim_fast.loss.mask_loss import GridPredictions, compute_mask_shares
from swim_fast.options import METRICS


@torch.no_grad()
def sum_metrics(predictions: GridPredictions) -> Tensor:
    """Return sums over the pairs, to be added up over batches and ranks before `average_metrics`.

    Returns:
        float64 [4], on the maps' device: sums in the order of `METRICS`, then the number of pairs with a mask; with
        fusion "none" [layers, 4]. Nothing is read back from the device.
    """
    predictions = predictions.as_min_max()
    targets, per_layer = predictions.targets, predictions.fusion == "none"
    sums = torch.zeros((len(predictions.maps) if per_layer else 1, 4), dtype=torch.float64, device=targets.device)
    for group in targets.groups:
        p, log_f = targets.frames(group, predictions.p), targets.frames(group, predictions.log_f)  # [K, P_g, h, w]
        share = compute_mask_shares(targets, group, p.dtype)  # [P_g, h, w]
        centres = torch.cat([_at_cell_centres(masks, group.grid) for masks in targets.mask_chunks(group)])[group.mask]
        peak = log_f == log_f.amax((-2, -1), keepdim=True)
        hit = (peak & centres).sum((-2, -1)) / peak.sum((-2, -1))
        mass = (log_f.exp() * share).sum((-2, -1))
        common = (p * share).sum((-2, -1))
        iou = common / (p.sum((-2, -1)) + share.sum((-2, -1)) - common)
        counts = (share.sum((-2, -1)) > 0).expand_as(hit)
        values = torch.stack([hit, mass, iou, torch.ones_like(mass)], dim=-1)  # [K, P_g, 4]
        sums += torch.where(counts[..., None], values, 0).double().sum(-2)
    return sums if per_layer else sums[0]


def average_metrics(sums: Tensor, names: Iterable[str] = METRICS) -> dict[str, float]:
    """Return the mean of each metric over the pairs, which the last of the sums counts; NaN without pairs.

    Args:
        sums: [len(names) + 1], as `sum_metrics` and `sum_ranking_metrics` have them. Waits for their device.
        names: the metrics in order, `METRICS` or `RANKING_METRICS`.
    """
    *totals, pairs = sums.tolist()
    return {name: total / pairs if pairs else float("nan") for name, total in zip(names, totals, strict=True)}


def _at_cell_centres(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the pixel under each cell's centre: bool [..., Hm, Wm] -> [..., h, w]."""
    rows, columns = (
        (2 * torch.arange(cells, device=masks.device) + 1) * pixels // (2 * cells)
        for cells, pixels in zip(grid, masks.shape[-2:], strict=True)
    )
    return masks[..., rows[:, None], columns]
