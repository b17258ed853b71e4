"""Mask BCE in torch operations, on any device, with little memory: pixels are processed in chunks of rows.

The upsampling is separable, u = Ry c Rxᵀ with matrices Ry [H, h] and Rx [W, w] of at most two weights a row. The
gradient of the cells is computed in the same pass and is all that backward keeps:

    ∂c = Ryᵀ s Rx / (H W)                      s = d loss / d u of every pixel
    s  = (1 - 2 · 1e-6) (1 - 2 m) / v          v the argument of the logarithm

All pairs of one mask and one grid size go together: a chunk of the mask is unpacked once for them, small enough to stay
in a core's cache. Deterministic: chunks depend on shapes only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swim_kernels.mask_bce.reference import MARGIN, group_pairs, split_pairs
from swim_kernels.runtime.numerics import exact_product, interpolation
from swim_kernels.structs.grid_pairs import GridPairs
from swim_kernels.structs.packed_masks import PackedMasks

# Pixels computed at a time. On the CPU a core's cache holds them, and torch does not divide them among threads, which
# on this scale costs more than it gives (and very much where the cores are busy). A GPU wants fewer, longer launches.
_CHUNK_PIXELS_CPU = 2**15 - 1
_CHUNK_PIXELS_ACCELERATOR = 2**24
_LOGARITHMS = 2**18  # taken at a time: they are always divided among threads
_MULTIPLIED = 4  # arguments of logarithms, each at least 1e-6, so that fp32 holds the product
_FEW_ROWS = 4  # of pixels for each row of cells: for fewer a matrix product is less work
_MOST_VALUES = 2**21  # of frames that share an unpacked chunk of their mask


def mask_bce_torch(cells: Tensor, pairs: GridPairs, masks: PackedMasks) -> Tensor:
    """Return losses [K, P]; arguments as `mask_bce`, already checked, fp32 or float64. No double backward."""
    return apply_with_gradient(compute_losses, cells, pairs, masks)


def apply_with_gradient(compute: Callable, cells: Tensor, pairs: GridPairs, masks: PackedMasks) -> Tensor:
    """Return the losses of a function as `compute_losses`, differentiable."""
    want = torch.is_grad_enabled() and cells.requires_grad
    return _MaskBCE.apply(cells, compute, pairs, masks, want)


class _MaskBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cells, compute, pairs, masks, want):
        ctx.set_materialize_grads(False)
        losses, gradient = compute(cells, pairs, masks, want)
        if want:
            ctx.save_for_backward(gradient, pairs.table)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        if grad_losses is None:
            return (None,) * 5
        gradient, table = ctx.saved_tensors
        num_cells = table[:, 2] * table[:, 3]
        upstream = grad_losses.repeat_interleave(num_cells, dim=1, output_size=gradient.shape[1])
        # A pair that gets no gradient passes none on, also where its own gradient is NaN.
        return torch.where(upstream == 0, 0, gradient * upstream), *(None,) * 4


def compute_losses(cells: Tensor, pairs: GridPairs, masks: PackedMasks, want: bool) -> tuple[Tensor, Tensor | None]:
    """Return losses [K, P] and, if wanted, d loss / d cell [K, M]."""
    num_sets = len(cells)
    if not cells.numel():
        return cells.new_empty(num_sets, len(pairs)), cells.new_empty(cells.shape) if want else None
    indices, frames = pairs.mask_indices, split_pairs(cells, pairs)
    losses, gradients = [cells] * len(pairs), [cells] * len(pairs)
    weights = functools.cache(functools.partial(interpolation, like=cells))
    chunks = functools.cache(lambda size, grid, frames: _chunk_rows(weights(size[0], grid[0]), size[1], frames))
    for (index, grid), members in group_pairs(pairs, lambda pair: (indices[pair], pairs.sizes[pair])).items():
        size = masks.sizes[index]
        together = max(1, _most_frames(grid, size) // num_sets)
        for first in range(0, len(members), together):
            some = members[first : first + together]
            stacked = torch.stack([frames[pair] for pair in some]).view(-1, *grid)  # [n · K, h, w]
            rows = chunks(size, grid, len(stacked))
            loss, grad = _compare(stacked, weights(size[1], grid[1]), rows, masks, index, want)
            for pair, part in zip(some, loss.view(len(some), num_sets).unbind(), strict=True):
                losses[pair] = part
            if want:
                for pair, part in zip(some, grad.view(len(some), num_sets, -1).unbind(), strict=True):
                    gradients[pair] = part
    return torch.stack(losses, dim=1), torch.cat(gradients, dim=1) if want else None


def _compare(
    cells: Tensor, across: Tensor, chunks: list[_Rows], masks: PackedMasks, index: int, want: bool
) -> tuple[Tensor, Tensor | None]:
    """Return losses [n] of patches [n, h, w] against one mask and, if wanted, gradients [n, h, w].

    across: weights [W, w] of the upsampling in x.
    """
    height, width = masks.sizes[index]
    upsampled = exact_product(cells, across.t())  # in x, [n, h, W]
    gradient = torch.zeros_like(upsampled) if want else None
    num_frames, num_rows = len(cells), max(rows.end - rows.first for rows in chunks)
    step = max(1, _CHUNK_PIXELS_CPU // (num_rows * width)) if cells.device.type == "cpu" else num_frames
    slots = min(-(-len(chunks) // _MULTIPLIED), max(1, _LOGARITHMS // (num_frames * num_rows * width)))
    together = slots * _MULTIPLIED  # chunks whose masks are prepared and whose logarithms are taken at once
    losses, arguments = cells.new_zeros(num_frames), cells.new_empty(slots, num_frames, num_rows, width)
    grads = gradient.split(step) if want else itertools.repeat(None)
    parts = [_Frames(*part) for part in zip(upsampled.split(step), grads, strict=False)]
    products = [slot.split(step) for slot in arguments]
    for start in range(0, len(chunks), together):
        some = chunks[start : start + together]
        unset = (~masks.rows(index, some[0].first, some[-1].end)).to(cells.dtype)
        slopes = (2 * unset).sub_(1).mul_(1 - 2 * MARGIN)  # d argument of the logarithm / d p, with the sign changed
        lengths = [rows.end - rows.first for rows in some]
        arguments.fill_(1)
        for k, (rows, blank, slope) in enumerate(zip(some, unset.split(lengths), slopes.split(lengths), strict=True)):
            for part, product in zip(parts, products[k // _MULTIPLIED], strict=True):
                p = part.upsample(rows)
                argument = torch.sub(blank, p, out=p).mul_(slope).add_(MARGIN)
                product[:, : lengths[k]] *= argument
                if want:
                    part.add_slopes(rows, slope / argument)
        arguments.log_()
        losses -= sum(torch.cat([logs.sum((-2, -1)) for logs in slot.split(step)]) for slot in arguments)
    return losses / (height * width), exact_product(gradient, across).div_(height * width) if want else None


def _most_frames(grid: tuple[int, int], mask: tuple[int, int]) -> int:
    """Return the number of patches to process together: upsampled in x, and for a chunk of rows in full."""
    return _MOST_VALUES // max(grid[0] * mask[1], min(mask[0] * mask[1], _CHUNK_PIXELS_CPU))


class _Rows(NamedTuple):
    """Pixel rows [first, end) and the cell rows [low, high) between which they are interpolated, at least two if any.

    Attributes:
        weights: [end - first, high - low].
        columns: of the weights, [end - first, 1] each.
    """

    first: int
    end: int
    low: int
    high: int
    weights: Tensor
    columns: tuple[Tensor, ...]


def _chunk_rows(down: Tensor, width: int, num_frames: int) -> list[_Rows]:
    """Return the chunks of rows, given the weights down [H, h] of the upsampling in y.

    On the CPU two rows of cells are enough for each, if there are several rows of pixels for a row of cells.
    """
    pixels, cells = down.shape
    if down.device.type == "cpu":
        most, edges = max(1, _CHUNK_PIXELS_CPU // width), [0, pixels]
        if pixels >= _FEW_ROWS * cells:  # where the next row of cells comes into play
            edges[1:1] = [-(-(pixels * (2 * k + 1) - cells) // (2 * cells)) for k in range(1, cells - 1)]
    else:
        most, edges = max(1, _CHUNK_PIXELS_ACCELERATOR // (num_frames * width)), [0, pixels]
    chunks = []
    for begin, stop in itertools.pairwise(edges):
        parts = -(-(stop - begin) // most)
        cuts = [begin + (stop - begin) * part // parts for part in range(parts + 1)]
        for first, end in itertools.pairwise(cuts):
            low, high = (max(0, (2 * y + 1) * cells - pixels) // (2 * pixels) for y in (first, end - 1))
            low, high = max(0, min(low, cells - 2)), min(high + 2, cells)
            weights = down[first:end, low:high]
            chunks.append(_Rows(first, end, low, high, weights, weights.split(1, dim=1)))
    return chunks


class _Frames:
    """Patches upsampled in x [n, h, W] and their gradients, with views made once of every row of cells."""

    def __init__(self, across: Tensor, grad_across: Tensor | None) -> None:
        self._across, self._grad = across, grad_across
        self._cells = across[:, :, None].unbind(1)  # [n, 1, W] each
        self._grads = () if grad_across is None else grad_across.unbind(1)  # [n, W] each

    def upsample(self, rows: _Rows) -> Tensor:
        """Return u [n, y, W]."""
        if len(rows.columns) == 2:
            before, after = rows.columns
            return torch.mul(before, self._cells[rows.low]).addcmul_(after, self._cells[rows.low + 1])
        return exact_product(rows.weights, self._across[:, rows.low : rows.high])

    def add_slopes(self, rows: _Rows, slope: Tensor) -> None:
        """Add d loss / d u [n, y, W], which is used up, to the gradients."""
        if len(rows.columns) == 2:
            before, after = rows.columns
            self._grads[rows.low].add_((before * slope).sum(1))
            self._grads[rows.low + 1].add_(slope.mul_(after).sum(1))
        else:
            self._grad[:, rows.low : rows.high] += exact_product(rows.weights.mT, slope)
