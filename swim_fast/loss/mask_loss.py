"""Mask loss: alignment of a noun's attention with its object's mask.

Method: SWIM, "See What I Mean", arXiv 2605.18018. The maps come from `swim_kernels.noun_attention`, one `[R, N]` per
supervised layer. A *pair* is one map row and one supervised temporal patch (a *frame* below): h x w columns of the
row in row-major order, and one binary object mask of its own size. Per frame, with f the fusion of the layers,

    p     = (f - min f) / (max f - min f)         the prediction, between 0 and 1
    log f = sum_l log a_l                          for fusion "product", up to a constant per frame

and a criterion compares p (or log f) with the mask. `GridPredictions` holds both, for the loss, metrics and pictures.

**stable numerics** work on log f with the frame's maximum subtracted, so that neither the product of many small
probabilities nor the number of visual keys matters; `swim_kernels/grid_prediction/reference.py` defines the limits.
Prediction and cross-entropy at the mask's resolution are ops of `swim_kernels` that keep the maps and a gradient on
the grid.

**paper numerics** are the released ones, with an epsilon of 1e-6 in the denominators of f and p: see
`swim_fast/loss/paper.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from swim_fast.errors import OptionError
from swim_fast.loss import paper
from swim_fast.loss.targets import MaskTargets, PairGroup
from swim_kernels import grid_prediction, mask_bce
from swim_kernels.grid_prediction import FUSIONS, floor_of, log_fused
from swim_kernels.mask_bce import MARGIN
from swim_kernels.runtime import exact_product, interpolation, no_autocast

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
    """Return the distance between attention maps and object masks, averaged over the pairs (arXiv 2605.18018).

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
        OptionError: unknown choice.
        ValueError, TypeError: no map, shapes, dtypes or devices that do not fit.
        IndexError: rows or columns outside the maps (on CUDA a device assertion); `MaskTargets.check` names the pair.
    """
    predictions = GridPredictions.from_maps(maps, targets, fusion=fusion, numerics=numerics, backend=backend)
    return compute_pair_losses(predictions, criterion, resolution).sum() / max(len(targets), 1)


@dataclass(frozen=True, eq=False)
class GridPredictions:
    """Fused maps at the cells of all pairs of a batch, each quantity computed once, when it is first read.

    Attributes:
        maps: one [R, N] per layer, fp32 or float64.
        targets: P pairs with M cells in all.
        fusion, numerics, backend: see `mask_alignment_loss`.
    """

    maps: Sequence[Tensor]
    targets: MaskTargets
    fusion: str
    numerics: str
    backend: str

    @classmethod
    def from_maps(
        cls,
        maps: Sequence[Tensor],
        targets: MaskTargets,
        *,
        fusion: str = "product",
        numerics: str = "stable",
        backend: str = "auto",
    ) -> GridPredictions:
        """Check the maps and bring them to fp32 (float64 stays). Arguments and errors as for `mask_alignment_loss`."""
        _check_choice("fusion", fusion, FUSIONS)
        _check_choice("numerics", numerics, NUMERICS)
        return cls(_check_maps(maps, targets), targets, fusion, numerics, backend)

    def detach(self) -> GridPredictions:
        """Return the same predictions without a graph; what has been computed is not computed again."""
        detached = replace(self, maps=[layer.detach() for layer in self.maps])
        vars(detached).update({name: vars(self)[name].detach() for name in ("p", "log_f") if name in vars(self)})
        return detached

    @cached_property
    def p(self) -> Tensor:
        """Min-max normalised predictions [K, M], in the order of the pairs; K = 1 or, with fusion "none", the layers.

        `targets.frames(group, p)` are those of one group.
        """
        with no_autocast(self.targets.device.type):
            if self.numerics == "stable":
                return grid_prediction(self.maps, self.targets.pairs, fusion=self.fusion, backend=self.backend)
            frames = self._frames(paper.fuse(self.maps, self.fusion))
            return torch.cat([paper.min_max(frame).flatten(1) for frame in frames], dim=1)

    @cached_property
    def log_f(self) -> Tensor:
        """Logarithm of f over its sum in the frame: [K, M], as `p`."""
        with no_autocast(self.targets.device.type):
            if self.numerics == "stable":
                logs = [log_fused(frame, self.fusion) for frame in self._frames(self.maps)]
            else:  # the normaliser over the video, which the paper's f has, cancels
                frames = self._frames(paper.fuse(self.maps, self.fusion))
                logs = [frame.clamp_min(floor_of(frame.dtype)).log() for frame in frames]
            return torch.cat([log.flatten(2).log_softmax(-1).flatten(1) for log in logs], dim=1)

    def _frames(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[len(maps), pairs, h, w] of each run of pairs with one grid, in the order of the pairs."""
        rows, columns = self.targets.pairs.cells
        cells = torch.stack([layer[rows, columns] for layer in maps])
        return [cells[:, part].unflatten(1, (-1, *size)) for _, part, size in self.targets.pairs.runs()]


def compute_pair_losses(predictions: GridPredictions, criterion: str = "bce", resolution: str = "mask") -> Tensor:
    """Return the terms of `mask_alignment_loss` before the mean: [P], in the order of the pairs."""
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("resolution", resolution, RESOLUTIONS)
    targets, numerics = predictions.targets, predictions.numerics
    if len(targets) == 0:
        return torch.cat([layer[:0].flatten() for layer in predictions.maps])
    with no_autocast(targets.device.type):  # on CUDA it refuses `binary_cross_entropy`
        if criterion == "kl":
            return _compare(targets, predictions.log_f, _cross_entropy)
        if criterion != "bce":
            return _compare(targets, predictions.p, partial(_overlap_loss, criterion=criterion, resolution=resolution))
        if resolution == "grid":
            return _compare(targets, predictions.p, partial(_grid_bce, numerics=numerics))
        if numerics == "paper":
            return _compare(targets, predictions.p, paper.mask_bce)
        return mask_bce(predictions.p, targets.pairs, targets.packed, backend=predictions.backend).mean(0)


def compute_mask_shares(targets: MaskTargets, group: PairGroup, dtype: torch.dtype) -> Tensor:
    """Return the masked share of each cell's area, for every pair of a group: [P_g, h, w]. See `average_mask`."""
    shares = [average_mask(masks, group.grid, dtype) for masks in targets.mask_chunks(group)]
    return torch.cat(shares)[group.mask]


def average_mask(masks: Tensor, grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the masked share of each cell's area, by exact overlap of pixels and cells.

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


def _check_maps(maps: Sequence[Tensor], targets: MaskTargets) -> list[Tensor]:
    """Return the maps in fp32 or float64, after the checks that need no value."""
    if not isinstance(targets, MaskTargets):
        raise TypeError(f"targets must be MaskTargets, got {type(targets).__name__}")
    maps = list(maps)
    if not maps:
        raise ValueError("no attention map: the mask loss needs at least one layer's [R, N]")
    for index, layer in enumerate(maps):
        if not isinstance(layer, Tensor) or not layer.is_floating_point():
            kind = layer.dtype if isinstance(layer, Tensor) else type(layer).__name__
            raise TypeError(f"maps[{index}] must be a floating-point tensor [R, N], got {kind}")
        if layer.dim() != 2 or layer.shape != maps[0].shape:
            raise ValueError(
                f"maps[{index}] has shape {list(layer.shape)}, maps[0] {list(maps[0].shape)}: "
                "one [R, N] per layer, all of one shape"
            )
        if layer.device != targets.device:
            raise ValueError(f"maps[{index}] is on {layer.device}, the targets are on {targets.device}: move one")
    dtype = torch.float64 if any(layer.dtype == torch.float64 for layer in maps) else torch.float32
    return [layer.to(dtype) for layer in maps]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def _compare(targets: MaskTargets, cells: Tensor, loss: Callable[[Tensor, MaskTargets, PairGroup], Tensor]) -> Tensor:
    """[P] from cells [K, M]: the losses [K, P_g] of each group's frames [K, P_g, h, w], averaged over K."""
    losses = torch.cat([loss(targets.frames(group, cells), targets, group).mean(0) for group in targets.groups])
    order = torch.cat([group.pairs for group in targets.groups])
    return torch.empty_like(losses).index_copy(0, order, losses)


def _grid_bce(p: Tensor, targets: MaskTargets, group: PairGroup, numerics: str) -> Tensor:
    share = compute_mask_shares(targets, group, p.dtype)
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
        masked, everything = compute_mask_shares(targets, group, p.dtype), p.new_ones(group.grid)
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
    share = compute_mask_shares(targets, group, log_f.dtype)
    area = share.sum((-2, -1), keepdim=True)
    return -(share / torch.where(area == 0, 1, area) * log_f).sum((-2, -1))
