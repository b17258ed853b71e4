"""From attention maps to the mask loss: the alignment of a noun's attention with its object's mask.

Method: SWIM, "See What I Mean", arXiv 2605.18018. The maps come from `swim_kernels.noun_attention`, one `[R, N]` per
supervised layer. A *pair* is one map row and one supervised temporal patch (a *frame* below): h x w columns of the
row in row-major order, and one binary object mask of its own size. Per frame, with f the fusion of the layers,

    p     = (f - min f) / (max f - min f)         the prediction, between 0 and 1
    log f = sum_l log a_l                          for fusion "product", up to a constant per frame

and a criterion compares p (or log f) with the mask.

**stable numerics** work on log f with the frame's maximum subtracted, so that neither the product of many small
probabilities nor the number of visual keys matters. Where the limit "both epsilons go to 0" needs a decision:

* An attention of exactly 0 (or below `finfo.tiny / finfo.eps`, 1e-31 in fp32) counts as that floor and gets no
  gradient. It could not use one: the softmax behind the map multiplies by that same probability. The floor stands
  1/eps above the smallest normal number, so that d log a / da = 1/a times an upstream gradient cannot overflow.
* A constant frame (a 1 x 1 grid is one) has p = 0, the limit of 0 / (0 + eps), and no gradient.
* The cells at the frame's minimum and maximum are p = 0 and p = 1 whatever f is; p has no gradient there. It is cut
  explicitly: left to automatic differentiation, BCE's slope of 1e6 at p = 0 and 1 would have to cancel in fp32.
* p is what a min-max makes of f: its gradient grows as the frame flattens (like 1 / (max - min)).

**paper numerics** are the released ones: f over all visual keys and p each with an epsilon of 1e-6 in the
denominator, everything in the maps' precision, no floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from swim_fast.mask_targets import MaskTargets, PairGroup

__all__ = [
    "CRITERIA",
    "FUSIONS",
    "NUMERICS",
    "RESOLUTIONS",
    "FramePredictions",
    "MaskTargets",
    "PairGroup",
    "area_average",
    "frame_predictions",
    "mask_alignment_loss",
    "pair_losses",
]

FUSIONS = ("product", "mean", "none")
CRITERIA = ("bce", "iou", "dice", "kl")
RESOLUTIONS = ("mask", "grid")
NUMERICS = ("stable", "paper")

PAPER_EPSILON = 1e-6  # of the released code, twice: in the normaliser over the video and in the min-max
BCE_MARGIN = 1e-6  # stable: p is mapped to [margin, 1 - margin] before the logarithm


def mask_alignment_loss(
    maps: Sequence[Tensor],
    targets: MaskTargets,
    *,
    fusion: str = "product",
    criterion: str = "bce",
    numerics: str = "stable",
    resolution: str = "mask",
) -> Tensor:
    """Mean over the pairs of how far the noun's attention is from the object's mask (arXiv 2605.18018).

    Args:
        maps: one [R, N] per layer, non-negative, any strides; bf16 and fp16 are computed in fp32, float64 stays.
        targets: P pairs on the maps' device.
        fusion: f = "product" over layers of a, "mean" over layers, or "none": the loss per layer, averaged.
        criterion:
            "bce": binary cross-entropy, mean over pixels (cells). stable: p is mapped to 1e-6 + (1 - 2e-6) p before
                the logarithms; paper: torch's `binary_cross_entropy`, whose logarithms end at -100 and whose gradient
                ends at 1e12.
            "iou": 1 - sum p m / sum (p + m - p m).
            "dice": 1 - 2 sum p m / (sum p + sum m).
            "kl": cross-entropy -sum t log softmax(log f) over the frame's cells, t = each cell's share of the mask's
                area. It compares distributions over *cells*, at either resolution. paper: the same on the paper's f,
                its zeros at the floor of the stable numerics (the normaliser over the video cancels).
        numerics: "stable" or "paper", see the module's docstring; "iou" and "dice" take the p of either.
        resolution: "mask": p is upsampled to Hm x Wm (bilinear, half-pixel centres, `align_corners=False`);
            "grid": the mask is averaged down to h x w by exact pixel-cell overlap and becomes a soft target.

    Returns:
        Scalar, float64 if the maps are, else fp32. P = 0 gives 0 with a graph that back-propagates zeros. A mask
        without a pixel is an ordinary target for "bce"; the others have no gradient for it: "iou" and "dice" are 1 (no
        overlap, also where the prediction is empty too), "kl" is 0 (no distribution to match).

    Raises:
        ValueError, TypeError: unknown choice, no map, shapes, dtypes or devices that do not fit.
        IndexError: rows or columns outside the maps (on CUDA a device assertion); `MaskTargets.check` names the pair.
    """
    losses = pair_losses(maps, targets, fusion=fusion, criterion=criterion, numerics=numerics, resolution=resolution)
    return losses.sum() / max(len(targets), 1)


def pair_losses(
    maps: Sequence[Tensor],
    targets: MaskTargets,
    *,
    fusion: str = "product",
    criterion: str = "bce",
    numerics: str = "stable",
    resolution: str = "mask",
) -> Tensor:
    """The terms of `mask_alignment_loss` before the mean: [P], in the order of the pairs. Arguments as there."""
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("resolution", resolution, RESOLUTIONS)
    maps = _checked_maps(maps, targets, fusion, numerics)
    if len(targets) == 0:
        return torch.cat([layer[:0].flatten() for layer in maps])
    losses = []
    with _no_autocast(targets.device):  # on CUDA it refuses `binary_cross_entropy`
        for group, fused in zip(targets.groups, _fused_frames(maps, targets, fusion, numerics), strict=True):
            masks = targets.stacked_masks(group)
            if criterion == "kl":
                share = area_average(masks, group.grid, fused.dtype)[group.mask]
                loss = _cross_entropy(_log_distribution(fused, numerics), share)
            else:
                p = _min_max(fused, numerics)
                if resolution == "mask":
                    p = F.interpolate(p, size=group.mask_size, mode="bilinear", align_corners=False)
                    target = masks[group.mask]
                else:
                    target = area_average(masks, group.grid, p.dtype)[group.mask]
                loss = _bce(p, target, numerics) if criterion == "bce" else 1 - _overlap(p, target, criterion)
            losses.append(loss.mean(0))  # over the layers that were not fused
        order = torch.cat([group.pairs for group in targets.groups])
        return torch.empty_like(torch.cat(losses)).index_copy(0, order, torch.cat(losses))


@dataclass(frozen=True, eq=False)
class FramePredictions:
    """The fused maps of one `PairGroup`, for metrics and pictures.

    Attributes:
        group: which pairs (`group.pairs`), their grid and masks.
        p: [P_g, h, w], the min-max normalised prediction; with fusion "none" [layers, P_g, h, w].
        log_f: same shape, log f less its log-sum-exp over the frame, so that exp(log_f) sums to 1.
    """

    group: PairGroup
    p: Tensor
    log_f: Tensor


def frame_predictions(
    maps: Sequence[Tensor], targets: MaskTargets, *, fusion: str = "product", numerics: str = "stable"
) -> list[FramePredictions]:
    """What the loss compares with the masks, one entry per size group (none for P = 0).

    Arguments and errors as for `mask_alignment_loss`; differentiable.
    """
    maps = _checked_maps(maps, targets, fusion, numerics)
    if len(targets) == 0:
        return []
    predictions = []
    for group, fused in zip(targets.groups, _fused_frames(maps, targets, fusion, numerics), strict=True):
        p, log_f = _min_max(fused, numerics), _log_distribution(fused, numerics)
        if fusion != "none":
            p, log_f = p[0], log_f[0]
        predictions.append(FramePredictions(group, p, log_f))
    return predictions


def area_average(masks: Tensor, grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The masked share of each cell's area, by exact overlap of pixels and cells.

    `adaptive_avg_pool2d` counts a pixel that straddles two cells fully in both; here it is divided between them. In
    units of 1/h pixel a pixel spans h and a cell Hm, so all overlaps are integers, and products and sums stay exact
    in fp32 for masks below 2^24 pixels (also under TF32 with sides below 2^11): the result is correctly rounded.

    Args:
        masks: bool or uint8 {0, 1}, [..., Hm, Wm].
        grid: (h, w).
        dtype: of the result, fp32 or float64.

    Returns:
        [..., h, w] in [0, 1].
    """
    height, width = masks.shape[-2:]
    rows = _integer_overlaps(height, grid[0], masks.device).to(dtype)  # [h, Hm]
    columns = _integer_overlaps(width, grid[1], masks.device).to(dtype)  # [w, Wm]
    with _no_autocast(masks.device):  # 16 bits do not hold the integers
        return rows @ masks.to(dtype) @ columns.T / (height * width)


def _no_autocast(device: torch.device) -> AbstractContextManager:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _integer_overlaps(pixels: int, cells: int, device: torch.device) -> Tensor:
    """[cells, pixels] int64: length of cell c that pixel i covers, in units of 1/cells pixel."""
    pixel = torch.arange(pixels, device=device) * cells
    cell = torch.arange(cells, device=device)[:, None] * pixels
    return (torch.minimum(pixel + cells, cell + pixels) - torch.maximum(pixel, cell)).clamp_min(0)


def _checked_maps(maps: Sequence[Tensor], targets: MaskTargets, fusion: str, numerics: str) -> list[Tensor]:
    """The maps in fp32 or float64, after the checks that need no value."""
    _check_choice("fusion", fusion, FUSIONS)
    _check_choice("numerics", numerics, NUMERICS)
    if not isinstance(targets, MaskTargets):
        raise TypeError(f"targets must be MaskTargets, got {type(targets).__name__}")
    maps = list(maps)
    if not maps:
        raise ValueError("no attention map: the mask loss needs at least one layer's [R, N]")
    for number, layer in enumerate(maps):
        if not isinstance(layer, Tensor) or not layer.is_floating_point():
            kind = layer.dtype if isinstance(layer, Tensor) else type(layer).__name__
            raise TypeError(f"maps[{number}] must be a floating-point tensor [R, N], got {kind}")
        if layer.dim() != 2 or layer.shape != maps[0].shape:
            raise ValueError(
                f"maps[{number}] has shape {list(layer.shape)}, maps[0] {list(maps[0].shape)}: "
                "one [R, N] per layer, all of one shape"
            )
        if layer.device != targets.device:
            raise ValueError(f"maps[{number}] is on {layer.device}, the targets are on {targets.device}: move one")
    dtype = torch.float64 if any(layer.dtype == torch.float64 for layer in maps) else torch.float32
    return [layer.to(dtype) for layer in maps]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def _fused_frames(maps: list[Tensor], targets: MaskTargets, fusion: str, numerics: str) -> list[Tensor]:
    """Per group [K, P_g, h, w], K = 1 or, with fusion "none", the layers: log f (stable) or f (paper)."""
    if numerics == "paper":
        if fusion == "product":
            maps = [reduce(torch.mul, maps)]
        elif fusion == "mean":
            maps = [torch.stack(maps).mean(0)]
        # Columns outside the row's key set are 0: this is the sum over all its visual keys.
        maps = [f / (f.sum(-1, keepdim=True) + PAPER_EPSILON) for f in maps]
    rows, columns = targets.cells
    # One gather per layer for all groups: its backward makes one [R, N] gradient per layer, not one per group.
    values = torch.stack([layer[rows, columns] for layer in maps])  # [K, M]
    sizes = [len(group.pairs) * group.grid[0] * group.grid[1] for group in targets.groups]
    frames = []
    for group, cells in zip(targets.groups, values.split(sizes, dim=1), strict=True):
        cells = cells.unflatten(1, (len(group.pairs), *group.grid))
        frames.append(cells if numerics == "paper" else _log_fused(cells, fusion))
    return frames


def _floor(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def _log_fused(a: Tensor, fusion: str) -> Tensor:
    """log f of every frame, up to a constant; a [layers, P, h, w] -> [1 or layers, P, h, w]."""
    if fusion == "mean":
        a = a.mean(0, keepdim=True)
    a = a.clamp_min(_floor(a.dtype))
    # Divided by the frame's maximum first: log of a ratio near 1 keeps the digits that log a - log max would lose. The
    # divisor is detached, since p and the frame-softmax do not change when f is scaled.
    log_f = (a / a.detach().amax((-2, -1), keepdim=True)).log()
    if fusion == "product":
        log_f = log_f.sum(0, keepdim=True)
    return log_f


def _min_max(fused: Tensor, numerics: str) -> Tensor:
    """p of every frame, from log f (stable) or f (paper); same shape, 0 on a constant frame."""
    low, high = fused.amin((-2, -1), keepdim=True), fused.amax((-2, -1), keepdim=True)
    if numerics == "paper":
        p = (fused - low) / (high - low + PAPER_EPSILON)
    else:
        # f - min f = f (1 - exp(log min f - log f)): no digit is lost, neither where f is tiny nor on a flat frame.
        spread = (low - high).expm1()
        p = (fused - high).exp() * (low - fused).expm1() / torch.where(spread == 0, 1, spread)
        p = torch.where(fused == high, 1, p)
    return torch.where(fused == low, 0, p)


def _log_distribution(fused: Tensor, numerics: str) -> Tensor:
    """log (f / sum over the frame of f), same shape."""
    log_f = fused if numerics == "stable" else fused.clamp_min(_floor(fused.dtype)).log()
    return log_f.flatten(-2).log_softmax(-1).view_as(log_f)


def _bce(p: Tensor, target: Tensor, numerics: str) -> Tensor:
    """[K, P, y, x] against [P, y, x], bool at mask resolution or a share on the grid -> [K, P]."""
    if numerics == "paper":
        # Not written out: torch's also bounds the gradient's denominator p (1 - p) from below, by 1e-12. On CUDA it
        # answers NaN with an assertion that ends the process.
        target = target.to(p.dtype).expand_as(p)
        loss = F.binary_cross_entropy(p.nan_to_num(nan=0.0), target, reduction="none")
        loss = torch.where(p.isnan(), p, loss)
    elif target.dtype == torch.bool:
        # A pixel has one of the two terms; one logarithm is all that is kept for backward, beside the mask itself.
        loss = -_inside(torch.where(target, p, 1 - p)).log()
    else:
        loss = -(target * _inside(p).log() + (1 - target) * _inside(1 - p).log())
    return loss.mean((-2, -1))


def _inside(p: Tensor) -> Tensor:
    # Applied to p and to 1 - p alike: 1 - (1e-6 + (1 - 2e-6) p) would lose the margin's digits in fp32.
    return BCE_MARGIN + (1 - 2 * BCE_MARGIN) * p


def _overlap(p: Tensor, target: Tensor, criterion: str) -> Tensor:
    """Soft IoU or Dice coefficient, [K, P, y, x] against [P, y, x] -> [K, P]; 0 where both are empty."""
    common = (torch.where(target, p, 0) if target.dtype == torch.bool else p * target).sum((-2, -1))
    both = p.sum((-2, -1)) + target.sum((-2, -1)).to(p.dtype)
    top, bottom = (common, both - common) if criterion == "iou" else (2 * common, both)
    return top / torch.where(bottom == 0, 1, bottom)


def _cross_entropy(log_f: Tensor, share: Tensor) -> Tensor:
    """-sum t log f, [K, P, h, w] against the masked share [P, h, w] of each cell -> [K, P]; 0 for an empty mask."""
    area = share.sum((-2, -1), keepdim=True)
    return -(share / torch.where(area == 0, 1, area) * log_f).sum((-2, -1))
