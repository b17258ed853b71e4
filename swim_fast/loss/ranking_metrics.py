"""Metrics of the paper's table of attention maps (SWIM, arXiv 2605.18018): the pixels of a mask, ranked by a map.

The map of a pair is interpolated to its mask (bilinear, half-pixel centres) and read as a score per pixel. The paper
names its metrics and prints no formula; these are the usual ones of the field:

gamepoint_top_{1,5,10}pct ("GamePoint@P")
    Share of the P % highest pixels, rounded up, that lie in the mask: the pointing game (Zhang et al., arXiv
    1608.00507) with more than one point.
gamepoint_top_{1,10,100} ("GamePoint@K")
    The same of the K highest pixels.
average_precision
    Σ_n (recall_n − recall_{n−1}) · precision_n over the distinct scores, from the highest.
auc
    Area under the ROC curve: the probability that a pixel of the mask scores higher than one outside, ties as 1/2.
nss
    Normalised scanpath saliency (Peters et al., "Components of bottom-up gaze allocation in natural images", Vision
    Research 45, 2005): mean over the mask of (score − mean) / standard deviation; 0 for a constant map.
precision_at_75
    Share of the pixels within the upper quarter of the map's range, (f − min f) / (max f − min f) ≥ 0.75, that lie in
    the mask.

Pixels that tie share their hits evenly, so that a constant map scores what random pointing would. None of these
depends on the scale of the map, and all but the last two only on the order of its pixels.

The released analysis script reads the paper's names in the same way but for this: maps are enlarged to the nearest
pixel, P % are rounded down, pixels that tie keep an arbitrary order, and its threshold of precision is 0.5.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from swim_fast.loss.mask_loss import GridPredictions
from swim_fast.options import RANKING_METRICS

LEVELS = 2**36  # in the map's range: pixels that are equal but for rounding tie

PERCENTS, POINTS = (1, 5, 10), (1, 10, 100)


@torch.no_grad()
def sum_ranking_metrics(predictions: GridPredictions) -> Tensor:
    """Return sums over the pairs, to be added up over batches and ranks before `average_metrics`. Waits for the device.

    Returns:
        float64 [len(RANKING_METRICS) + 1], on the maps' device: sums in the order of `RANKING_METRICS`, then the number
        of pairs whose mask is neither empty nor full; with fusion "none" [layers, len(RANKING_METRICS) + 1].
    """
    predictions = predictions.detach()
    targets, per_layer = predictions.targets, predictions.fusion == "none"
    shape = (len(predictions.maps) if per_layer else 1, len(RANKING_METRICS) + 1)
    sums = torch.zeros(shape, dtype=torch.float64, device=targets.device)
    for group in targets.groups:
        frames = targets.frames(group, predictions.log_f).exp()  # [K, P_g, h, w]
        for pair, mask in enumerate(group.mask.tolist()):
            pixels = targets.packed.unpack((group.mask_indices[mask],))[0]
            for layer, frame in enumerate(frames[:, pair]):
                values = compute_ranking_metrics(frame, pixels)
                if values is not None:
                    sums[layer] += F.pad(values, (0, 1), value=1.0)
    return sums if per_layer else sums[0]


@torch.no_grad()
def compute_ranking_metrics(grid_map: Tensor, mask: Tensor) -> Tensor | None:
    """Rank the pixels of one pair.

    Args:
        grid_map: [h, w], of any scale.
        mask: bool or uint8 {0, 1}, [Hm, Wm].

    Returns:
        float64 [len(RANKING_METRICS)] in their order, on the map's device, NaN for a map that is not finite; None where
        the mask has no pixel or has all, which no map can point at or miss.
    """
    inside = mask.to(grid_map.device).flatten() != 0
    if not inside.any() or inside.all():
        return None
    low, high = grid_map.double().aminmax()
    if not (high - low).isfinite():
        return grid_map.new_full((len(RANKING_METRICS),), math.nan, dtype=torch.float64)
    cells = (grid_map.double() - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    scores = F.interpolate(cells[None, None], size=mask.shape, mode="bilinear", align_corners=False).flatten()
    # one sort of integers ranks scores and mask together
    keys = (2 * (LEVELS * scores).round().long() + inside).sort().values.flip(0)
    levels, pixels = torch.unique_consecutive(keys >> 1, return_counts=True)
    ranked = pixels.cumsum(0)
    found = (keys & 1).cumsum(0)[ranked - 1].double()
    levels, pixels, ranked = levels.double(), pixels.double(), ranked.double()
    hits = found.diff(prepend=found.new_zeros(1))
    total, positives = float(len(keys)), float(found[-1])

    counts = [math.ceil(total * percent / 100) for percent in PERCENTS] + [min(points, total) for points in POINTS]
    top = torch.tensor(counts, dtype=torch.float64, device=keys.device)
    last = torch.searchsorted(ranked, top)  # level in which the last of the top pixels lies
    before = (ranked - pixels)[last], (found - hits)[last]
    game_points = (before[1] + (top - before[0]) * (hits / pixels)[last]) / top

    average_precision = (hits * found / ranked).sum() / positives
    outside = pixels - hits
    beaten = outside.flip(0).cumsum(0).flip(0) - outside / 2  # pixels outside that score lower, ties as half
    auc = (hits * beaten).sum() / (positives * (total - positives))
    centred = levels - (levels * pixels).sum() / total
    spread = ((centred**2 * pixels).sum() / total).sqrt()
    nss = (hits * centred).sum() / positives / spread if len(levels) > 1 else spread.new_zeros(())
    upper = (levels >= levels[-1] + 0.75 * (levels[0] - levels[-1])).sum() - 1
    return torch.cat([game_points, torch.stack([average_precision, auc, nss, (found / ranked)[upper]])])
