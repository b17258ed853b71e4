"""How well the noun attention is grounded: does it lie on the object?

Per pair (one map row, one supervised patch), over the h x w cells of the fused frame map f of `grid_predictions`:

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

All three are per pair: a noun of several tokens has several rows, and each counts. A pair whose mask has no pixel says
nothing about pointing and is left out, of the number of pairs too. Everything is in stable numerics, whatever the loss
uses, so that runs can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swim_fast.loss.mask_loss import MaskTargets, grid_predictions, mask_shares

METRICS = ("pointing_accuracy", "mass_in_mask", "soft_iou")


@torch.no_grad()
def grounding_sums(maps: Sequence[Tensor], targets: MaskTargets, *, fusion: str = "product") -> Tensor:
    """Sums over the pairs, to be added up over batches and ranks before `grounding_means`.

    Args:
        maps: one [R, N] per layer, as for `swim_fast.loss.mask_loss.mask_alignment_loss`, whose errors it shares.
        targets: P pairs on the maps' device.
        fusion: "product" or "mean" of the layers, or "none": every layer by itself.

    Returns:
        float64 [4], on the maps' device: sums in the order of `METRICS`, then the number of pairs with a mask; with
        fusion "none" [layers, 4]. Nothing is read back from the device.
    """
    predictions = grid_predictions(maps, targets, fusion=fusion)
    shape = (len(maps), 4) if fusion == "none" else (4,)
    sums = torch.zeros(shape, dtype=torch.float64, device=targets.device)
    for prediction in predictions:
        group, p, log_f = prediction.group, prediction.p, prediction.log_f  # p, log_f: [(layers,) P_g, h, w]
        share = mask_shares(targets, group, p.dtype)  # [P_g, h, w]
        centres = torch.cat([_at_cell_centres(masks, group.grid) for masks in targets.mask_chunks(group)])[group.mask]
        peak = log_f == log_f.amax((-2, -1), keepdim=True)
        hit = (peak & centres).sum((-2, -1)) / peak.sum((-2, -1))
        mass = (log_f.exp() * share).sum((-2, -1))
        common = (p * share).sum((-2, -1))
        iou = common / (p.sum((-2, -1)) + share.sum((-2, -1)) - common)
        counts = (share.sum((-2, -1)) > 0).expand_as(hit)
        values = torch.stack([hit, mass, iou, torch.ones_like(mass)], dim=-1)  # [(layers,) P_g, 4]
        sums += torch.where(counts[..., None], values, 0).double().sum(-2)
    return sums


def grounding_means(sums: Tensor) -> dict[str, float]:
    """`grounding_sums` [4] to {metric: mean over the pairs}; nan where there was no pair. Waits for the device."""
    *totals, pairs = sums.tolist()
    return {name: total / pairs if pairs else float("nan") for name, total in zip(METRICS, totals, strict=True)}


def _at_cell_centres(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixel under each cell's centre: bool [..., Hm, Wm] -> [..., h, w]."""
    rows, columns = (
        (2 * torch.arange(cells, device=masks.device) + 1) * pixels // (2 * cells)
        for cells, pixels in zip(grid, masks.shape[-2:], strict=True)
    )
    return masks[..., rows[:, None], columns]
