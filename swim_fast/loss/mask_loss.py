"""Mask loss: alignment of a noun's attention with its object's mask.

Method: SWIM, "See What I Mean", arXiv 2605.18018. The maps come from `swim_kernels.noun_attention`, one `[R, N]` per
supervised layer. A *pair* is one map row and one supervised temporal patch: h x w columns of the row in row-major
order, and one binary object mask of its own size. Per patch, with f the fusion of the layers,

    f = 1/layers Σ_l a_l                          fusion "mean" (Eq. 6), or their sum, product, or none
    p = f                                         prediction "probability" (Eq. 7)
        (f - min f) / (max f - min f)             "min_max": the released p as its epsilons go to 0
        `swim_fast/loss/released.py`              "released"

and a criterion compares p (or log f) with the mask. `GridPredictions` holds both, for the loss, metrics and pictures.
Limits of "min_max" are defined in `swim_kernels/grid_prediction/reference.py`. Prediction and cross-entropy at the
mask's resolution are ops of `swim_kernels` that keep the maps and a gradient on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swim_fast.errors import OptionError
from swim_fast.loss import released
from swim_fast.loss.klal import compute_row_divergences
from swim_fast.loss.targets import MaskTargets, PairGroup
from swim_kernels import grid_prediction, mask_bce
from swim_kernels.grid_prediction import FUSIONS, floor_of, log_fused
from swim_kernels.mask_bce import MARGIN
from swim_kernels.runtime import exact_product, interpolation, no_autocast

CRITERIA = ("bce", "focal", "iou", "dice", "kl", "mass")  # each of one patch
OF_ROWS = ("klal",)
PREDICTIONS = ("probability", "min_max", "released")
RESOLUTIONS = ("mask", "grid")
FOCUS = 2  # γ of the focal loss


def mask_alignment_loss(
    maps: Sequence[Tensor],
    targets: MaskTargets,
    *,
    fusion: str = "mean",
    criterion: str = "bce",
    prediction: str = "probability",
    resolution: str = "mask",
    backend: str = "auto",
) -> Tensor:
    """Return the distance between attention maps and object masks, averaged over the pairs (arXiv 2605.18018).

    Args:
        maps: one [R, N] per layer, non-negative, any strides; bf16 and fp16 are computed in fp32, float64 stays.
        targets: P pairs on the maps' device.
        fusion: f = "mean" over layers of a, "add", "product", or "none": the loss per layer, averaged.
        criterion: of p (f for the last two) and the mask m, or its share of each cell.
            "bce": binary cross-entropy, mean over pixels (cells). p is mapped to 1e-6 + (1 - 2e-6) p before the
                logarithms; "released": torch's `binary_cross_entropy`, whose logarithms end at -100 and whose gradient
                ends at 1e12.
            "focal": the same with its terms weighted by (1 - p)^2 where m = 1 and p^2 where m = 0 (Lin et al.,
                arXiv 1708.02002, gamma 2, no alpha).
            "iou": 1 - sum p m / sum (p + m - p m).
            "dice": 1 - 2 sum p m / (sum p + sum m).
            "kl": cross-entropy -sum t log softmax(log f) over the patch's cells, t = each cell's share of the mask's
                area. It compares distributions over *cells*, at either resolution. "released": the same on the
                released f, its zeros at the floor of `grid_prediction` (the normaliser over the video cancels).
            "mass": -log (sum m f / sum f), over cells as "kl".
            "klal": see `swim_fast/loss/klal.py`; over all patches of a row, with "probability" alone.
        prediction: "probability", "min_max" or "released", see the module's docstring. With "probability" and fusion
            "add", p ends at 1.
        resolution: "mask": p is upsampled to Hm x Wm (bilinear, half-pixel centres, `align_corners=False`);
            "grid": the mask is averaged down to h x w by exact pixel-cell overlap and becomes a soft target.
        backend: of the ops in `swim_kernels`: "auto", "eager", "torch" or "triton".

    Returns:
        Scalar, float64 if the maps are, else fp32. P = 0 gives 0 with a graph that back-propagates zeros. A mask
        without a pixel is an ordinary target for "bce" and "focal"; the others have no gradient for it: "iou" and
        "dice" are 1 (no overlap, also where the prediction is empty too), "kl" and "mass" are 0 (nothing to match).

    Raises:
        OptionError: unknown choice.
        ValueError, TypeError: no map, shapes, dtypes or devices that do not fit.
        IndexError: rows or columns outside the maps (on CUDA a device assertion); `MaskTargets.check` names the pair.
    """
    predictions = GridPredictions.from_maps(maps, targets, fusion=fusion, prediction=prediction, backend=backend)
    return compute_pair_losses(predictions, criterion, resolution).sum() / max(len(targets), 1)


@dataclass(frozen=True, eq=False)
class GridPredictions:
    """Fused maps at the cells of all pairs of a batch, each quantity computed once, when it is first read.

    Attributes:
        maps: one [R, N] per layer, fp32 or float64.
        targets: P pairs with M cells in all.
        fusion, prediction, backend: see `mask_alignment_loss`.
    """

    maps: Sequence[Tensor]
    targets: MaskTargets
    fusion: str
    prediction: str
    backend: str

    @classmethod
    def from_maps(
        cls,
        maps: Sequence[Tensor],
        targets: MaskTargets,
        *,
        fusion: str = "mean",
        prediction: str = "probability",
        backend: str = "auto",
    ) -> GridPredictions:
        """Check the maps and bring them to fp32 (float64 stays). Arguments and errors as for `mask_alignment_loss`."""
        _check_choice("fusion", fusion, FUSIONS)
        _check_choice("prediction", prediction, PREDICTIONS)
        return cls(_check_maps(maps, targets), targets, fusion, prediction, backend)

    def detach(self) -> GridPredictions:
        """Return the same predictions without a graph; what has been computed is not computed again."""
        detached = replace(self, maps=[layer.detach() for layer in self.maps])
        vars(detached).update({name: vars(self)[name].detach() for name in ("p", "log_f") if name in vars(self)})
        return detached

    @cached_property
    def p(self) -> Tensor:
        """Predictions [K, M], in the order of the pairs; K = 1 or, with fusion "none", the layers.

        `targets.frames(group, p)` are those of one group.
        """
        with no_autocast(self.targets.device.type):
            if self.prediction != "released":
                how = {"fusion": self.fusion, "prediction": self.prediction, "backend": self.backend}
                return grid_prediction(self.maps, self.targets.pairs, **how)
            frames = self._frames(released.fuse(self.maps, self.fusion))
            return torch.cat([released.min_max(frame).flatten(1) for frame in frames], dim=1)

    @cached_property
    def log_f(self) -> Tensor:
        """Logarithm of f over its sum in the patch: [K, M], as `p`."""
        with no_autocast(self.targets.device.type):
            if self.prediction != "released":
                logs = [log_fused(frame, self.fusion) for frame in self._frames(self.maps)]
            else:  # the normaliser over the video, which the released f has, cancels
                frames = self._frames(released.fuse(self.maps, self.fusion))
                logs = [frame.clamp_min(floor_of(frame.dtype)).log() for frame in frames]
            return torch.cat([log.flatten(2).log_softmax(-1).flatten(1) for log in logs], dim=1)

    def _frames(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[len(maps), pairs, h, w] of each run of pairs with one grid, in the order of the pairs."""
        rows, columns = self.targets.pairs.cells
        cells = torch.stack([layer[rows, columns] for layer in maps])
        return [cells[:, part].unflatten(1, (-1, *size)) for _, part, size in self.targets.pairs.runs()]


def compute_pair_losses(predictions: GridPredictions, criterion: str = "bce", resolution: str = "mask") -> Tensor:
    """Return the terms of `mask_alignment_loss` before the mean: [P], in the order of the pairs."""
    _check_choice("criterion", criterion, CRITERIA + OF_ROWS)
    _check_choice("resolution", resolution, RESOLUTIONS)
    targets, as_released = predictions.targets, predictions.prediction == "released"
    if len(targets) == 0:
        return torch.cat([layer[:0].flatten() for layer in predictions.maps])
    with no_autocast(targets.device.type):  # on CUDA it refuses `binary_cross_entropy`
        if criterion == "klal":
            if predictions.prediction != "probability":
                raise OptionError(f"criterion klal compares probabilities, not prediction={predictions.prediction!r}")
            return compute_row_divergences(predictions.maps, targets, predictions.fusion)
        if criterion in ("kl", "mass"):
            return _compare(targets, predictions.log_f, _cross_entropy if criterion == "kl" else _mass_loss)
        if criterion in ("iou", "dice"):
            return _compare(targets, predictions.p, partial(_overlap_loss, criterion=criterion, resolution=resolution))
        if criterion == "bce" and resolution == "mask" and not as_released:
            return mask_bce(predictions.p, targets.pairs, targets.packed, backend=predictions.backend).mean(0)
        cost = partial(_pixel_cost, criterion=criterion, as_released=as_released)
        return _compare(targets, predictions.p, partial(_grid_loss if resolution == "grid" else _mask_loss, cost=cost))


def compute_mask_shares(targets: MaskTargets, group: PairGroup, dtype: torch.dtype) -> Tensor:
    """Return the masked share of each cell's area, for every pair of a group: [P_g, h, w]."""
    return targets.frames(group, targets.cell_shares(dtype))


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
    """Return [P] from cells [K, M]: the losses [K, P_g] of each group's frames [K, P_g, h, w], averaged over K."""
    losses = torch.cat([loss(targets.frames(group, cells), targets, group).mean(0) for group in targets.groups])
    order = torch.cat([group.pairs for group in targets.groups])
    return torch.empty_like(losses).index_copy(0, order, losses)


def _pixel_cost(p: Tensor, target: Tensor, criterion: str, as_released: bool) -> Tensor:
    """Return cross-entropy or focal loss of every p in [0, 1] with targets in [0, 1] that broadcast to it."""
    if as_released and criterion == "bce":
        return released.bce(p, target)
    if as_released:
        inside, outside = (released.bce(p, torch.full_like(p, value)) for value in (1, 0))
    else:
        inside, outside = -_inside(p).log(), -_inside(1 - p).log()
    if criterion == "focal":
        inside, outside = (1 - p) ** FOCUS * inside, p**FOCUS * outside
    return target * inside + (1 - target) * outside


def _grid_loss(p: Tensor, targets: MaskTargets, group: PairGroup, cost: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the mean cost over the cells [..., P_g] of a group's patches [..., P_g, h, w]."""
    return cost(p, compute_mask_shares(targets, group, p.dtype)).mean((-2, -1))


def _mask_loss(p: Tensor, targets: MaskTargets, group: PairGroup, cost: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the mean cost over the pixels [..., P_g] of a group's patches [..., P_g, h, w].

    p is upsampled to its mask's size (bilinear, half-pixel centres, `align_corners=False`), a few pairs at a time.
    Nothing of the size of the pixels is kept: it is computed again in backward.
    """
    rows, columns = (interpolation(*sizes, like=p) for sizes in zip(group.mask_size, group.grid, strict=True))

    def compute(p: Tensor, pairs: slice) -> Tensor:
        indices = group.masks_of_pairs[pairs]
        distinct = list(dict.fromkeys(indices))
        index = torch.tensor([distinct.index(mask) for mask in indices]).to(p.device, non_blocking=True)
        masks = targets.packed.unpack(distinct)[index].to(p.dtype)
        return cost(exact_product(exact_product(rows, p), columns.mT), masks).mean((-2, -1))

    step = max(1, targets.chunk_pixels // math.prod(group.mask_size))
    parts = [slice(first, first + step) for first in range(0, len(group.masks_of_pairs), step)]
    losses = [checkpoint(compute, p[:, part], part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(losses, dim=1)


def _inside(p: Tensor) -> Tensor:
    # Applied to p and to 1 - p alike: 1 - (1e-6 + (1 - 2e-6) p) would lose the margin's digits in fp32.
    return MARGIN + (1 - 2 * MARGIN) * p


def _overlap_loss(p: Tensor, targets: MaskTargets, group: PairGroup, criterion: str, resolution: str) -> Tensor:
    """Return 1 - soft IoU or Dice coefficient; the coefficient is 0 where both are empty.

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


def _mass_loss(log_f: Tensor, targets: MaskTargets, group: PairGroup) -> Tensor:
    """Return -log of the share of f inside the mask; 0 for an empty mask."""
    share = compute_mask_shares(targets, group, log_f.dtype)
    inside = torch.where(share > 0, share, 1).log() + log_f
    empty = (share == 0).all(-1).all(-1)
    inside = inside.masked_fill((share == 0) & ~empty[..., None, None], float("-inf"))
    return torch.where(empty, 0, -inside.flatten(-2).logsumexp(-1))


def _cross_entropy(log_f: Tensor, targets: MaskTargets, group: PairGroup) -> Tensor:
    """Return -sum t log f against the masked share of each cell; 0 for an empty mask."""
    share = compute_mask_shares(targets, group, log_f.dtype)
    area = share.sum((-2, -1), keepdim=True)
    return -(share / torch.where(area == 0, 1, area) * log_f).sum((-2, -1))
