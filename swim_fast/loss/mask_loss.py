"""From attention maps to the mask loss: the alignment of a noun's attention with its object's mask.

Method: SWIM, "See What I Mean", arXiv 2605.18018. The maps come from `swim_kernels.noun_attention`, one `[R, N]` per
supervised layer. A *pair* is one map row and one supervised temporal patch (a *frame* below): h x w columns of the
row in row-major order, and one binary object mask of its own size. Per frame, with f the fusion of the layers,

    p     = (f - min f) / (max f - min f)         the prediction, between 0 and 1
    log f = sum_l log a_l                          for fusion "product", up to a constant per frame

and a criterion compares p (or log f) with the mask.

**stable numerics** work on log f with the frame's maximum subtracted, so that neither the product of many small
probabilities nor the number of visual keys matters; what happens in the limits is said in
`swim_kernels/grid_prediction/reference.py`. Prediction and cross-entropy at the mask's resolution are ops of
`swim_kernels` that keep the maps and a gradient on the grid.

**paper numerics** are the released ones, with an epsilon of 1e-6 in the denominators of f and p: see
`swim_fast/loss/paper.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from swim_fast.loss import paper
from swim_fast.loss.targets import MaskTargets, PairGroup
from swim_kernels import grid_prediction as grid_prediction
from swim_kernels import mask_bce
from swim_kernels.grid_prediction.reference import FUSIONS, floor_of, log_fused
from swim_kernels.mask_bce.reference import MARGIN
from swim_kernels.runtime.numerics import exact_product, interpolation, no_autocast

__all__ = [
    "CRITERIA",
    "FUSIONS",
    "NUMERICS",
    "RESOLUTIONS",
    "GridPredictions",
    "MaskTargets",
    "PairGroup",
    "area_average",
    "grid_predictions",
    "mask_alignment_loss",
    "mask_shares",
    "pair_losses",
]

CRITERIA = ("bce", "iou", "dice", "kl")
RESOLUTIONS = ("mask", "grid")
NUMERICS = ("stable", "paper")


def mask_alignment_loss(
    maps: Sequence[Tensor],
    targets: MaskTargets,
    *,
    fusion: str = "product",
    criterion: str = "bce",
    numerics: str = "stable",
    resolution: str = "mask",
    backend: str = "auto",
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
        backend: of the ops in `swim_kernels`: "auto", "eager", "torch" or "triton".

    Returns:
        Scalar, float64 if the maps are, else fp32. P = 0 gives 0 with a graph that back-propagates zeros. A mask
        without a pixel is an ordinary target for "bce"; the others have no gradient for it: "iou" and "dice" are 1 (no
        overlap, also where the prediction is empty too), "kl" is 0 (no distribution to match).

    Raises:
        ValueError, TypeError: unknown choice, no map, shapes, dtypes or devices that do not fit.
        IndexError: rows or columns outside the maps (on CUDA a device assertion); `MaskTargets.check` names the pair.
    """
    options = {"fusion": fusion, "criterion": criterion, "numerics": numerics, "resolution": resolution}
    return pair_losses(maps, targets, **options, backend=backend).sum() / max(len(targets), 1)


def pair_losses(
    maps: Sequence[Tensor],
    targets: MaskTargets,
    *,
    fusion: str = "product",
    criterion: str = "bce",
    numerics: str = "stable",
    resolution: str = "mask",
    backend: str = "auto",
) -> Tensor:
    """The terms of `mask_alignment_loss` before the mean: [P], in the order of the pairs. Arguments as there."""
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("resolution", resolution, RESOLUTIONS)
    maps = _checked_maps(maps, targets, fusion, numerics)
    if len(targets) == 0:
        return torch.cat([layer[:0].flatten() for layer in maps])
    with no_autocast(targets.device.type):  # on CUDA it refuses `binary_cross_entropy`
        if criterion == "kl":
            return _by_group(targets, _log_distribution(maps, targets, fusion, numerics), _cross_entropy)
        p = _predictions(maps, targets, fusion, numerics, backend)
        if criterion == "bce" and resolution == "mask" and numerics == "stable":
            return mask_bce(p, targets.pairs, targets.packed, backend=backend).mean(0)
        if criterion == "bce" and resolution == "mask":
            return _by_group(targets, p, paper.mask_bce)
        if criterion == "bce":
            return _by_group(targets, p, partial(_grid_bce, numerics=numerics))
        return _by_group(targets, p, partial(_overlap_loss, criterion=criterion, resolution=resolution))


@dataclass(frozen=True, eq=False)
class GridPredictions:
    """The fused maps of one `PairGroup`, for metrics and pictures.

    Attributes:
        group: which pairs (`group.pairs`), their grid and masks.
        p: [P_g, h, w], the min-max normalised prediction; with fusion "none" [layers, P_g, h, w].
        log_f: same shape, log f less its log-sum-exp over the frame, so that exp(log_f) sums to 1.
    """

    group: PairGroup
    p: Tensor
    log_f: Tensor


def grid_predictions(
    maps: Sequence[Tensor], targets: MaskTargets, *, fusion: str = "product", numerics: str = "stable"
) -> list[GridPredictions]:
    """What the loss compares with the masks, one entry per size group (none for P = 0).

    Arguments and errors as for `mask_alignment_loss`; differentiable.
    """
    maps = _checked_maps(maps, targets, fusion, numerics)
    if len(targets) == 0:
        return []
    p = _predictions(maps, targets, fusion, numerics, "auto")
    log_f = _log_distribution(maps, targets, fusion, numerics)
    if fusion != "none":
        p, log_f = p[0], log_f[0]
    return [GridPredictions(group, targets.frames(group, p), targets.frames(group, log_f)) for group in targets.groups]


def mask_shares(targets: MaskTargets, group: PairGroup, dtype: torch.dtype) -> Tensor:
    """The masked share of each cell's area, for every pair of a group: [P_g, h, w]. See `area_average`."""
    shares = [area_average(masks, group.grid, dtype) for masks in targets.mask_chunks(group)]
    return torch.cat(shares)[group.mask]


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
    with no_autocast(masks.device.type):  # 16 bits do not hold the integers
        return rows @ masks.to(dtype) @ columns.T / (height * width)


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


def _predictions(maps: list[Tensor], targets: MaskTargets, fusion: str, numerics: str, backend: str) -> Tensor:
    """p [K, M] of all cells, in the order of the pairs; K = 1 or, with fusion "none", the layers."""
    if numerics == "stable":
        return grid_prediction(maps, targets.pairs, fusion=fusion, backend=backend)
    cells = _cells(paper.fuse(maps, fusion), targets)
    frames = [cells[:, part].unflatten(1, (-1, *size)) for _, part, size in targets.pairs.runs()]
    return torch.cat([paper.min_max(frame).flatten(1) for frame in frames], dim=1)


def _cells(maps: list[Tensor], targets: MaskTargets) -> Tensor:
    """[len(maps), M] of all cells, in the order of the pairs."""
    rows, columns = targets.pairs.cells
    return torch.stack([layer[rows, columns] for layer in maps])


def _log_distribution(maps: list[Tensor], targets: MaskTargets, fusion: str, numerics: str) -> Tensor:
    """log (f / sum over the frame of f) [K, M] of all cells, in the order of the pairs."""
    cells = _cells(maps if numerics == "stable" else paper.fuse(maps, fusion), targets)
    parts = []
    for _, part, size in targets.pairs.runs():
        frames = cells[:, part].unflatten(1, (-1, *size))
        # the normaliser over the video, which the paper's f has, cancels
        log_f = log_fused(frames, fusion) if numerics == "stable" else frames.clamp_min(floor_of(frames.dtype)).log()
        parts.append(log_f.flatten(2).log_softmax(-1).flatten(1))
    return torch.cat(parts, dim=1)


def _by_group(targets: MaskTargets, cells: Tensor, loss: Callable[[Tensor, MaskTargets, PairGroup], Tensor]) -> Tensor:
    """[P] from cells [K, M]: of every group's frames [K, P_g, h, w] the losses [K, P_g], averaged over K."""
    losses = torch.cat([loss(targets.frames(group, cells), targets, group).mean(0) for group in targets.groups])
    order = torch.cat([group.pairs for group in targets.groups])
    return torch.empty_like(losses).index_copy(0, order, losses)


def _grid_bce(p: Tensor, targets: MaskTargets, group: PairGroup, numerics: str) -> Tensor:
    share = mask_shares(targets, group, p.dtype)
    if numerics == "paper":
        return paper.bce(p, share).mean((-2, -1))
    return -(share * _inside(p).log() + (1 - share) * _inside(1 - p).log()).mean((-2, -1))


def _inside(p: Tensor) -> Tensor:
    # Applied to p and to 1 - p alike: 1 - (1e-6 + (1 - 2e-6) p) would lose the margin's digits in fp32.
    return MARGIN + (1 - 2 * MARGIN) * p


def _overlap_loss(p: Tensor, targets: MaskTargets, group: PairGroup, criterion: str, resolution: str) -> Tensor:
    """1 - soft IoU or Dice coefficient; the coefficient is 0 where both are empty.

    Their sums are linear in p, and so is the upsampling: its transpose, applied to the mask, makes them sums over
    cells.
    """
    if resolution == "grid":
        masked, everything = mask_shares(targets, group, p.dtype), p.new_ones(group.grid)
    else:
        rows, columns = (interpolation(*sizes, like=p) for sizes in zip(group.mask_size, group.grid, strict=True))
        chunks = (masks.to(p.dtype) for masks in targets.mask_chunks(group))
        masked = [exact_product(exact_product(rows.mT, masks), columns) for masks in chunks]
        masked = torch.cat(masked)[group.mask]
        everything = rows.sum(0)[:, None] * columns.sum(0)
    common, both = (p * masked).sum((-2, -1)), (p * everything).sum((-2, -1)) + masked.sum((-2, -1))
    top, bottom = (common, both - common) if criterion == "iou" else (2 * common, both)
    return 1 - top / torch.where(bottom == 0, 1, bottom)


def _cross_entropy(log_f: Tensor, targets: MaskTargets, group: PairGroup) -> Tensor:
    """-sum t log f against the masked share of each cell; 0 for an empty mask."""
    share = mask_shares(targets, group, log_f.dtype)
    area = share.sum((-2, -1), keepdim=True)
    return -(share / torch.where(area == 0, 1, area) * log_f).sum((-2, -1))
