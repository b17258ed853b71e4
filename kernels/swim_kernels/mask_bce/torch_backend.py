"""Mask BCE in torch operations, on any device, with little memory: the pixels are worked through in chunks of rows.

The upsampling is separable, u = Ry c Rxᵀ with matrices Ry [H, h] and Rx [W, w] of at most two weights a row. The
gradient of the cells is made in the same pass and is all that is kept for backward:

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

from swim_kernels.mask_bce.reference import MARGIN, by_pair, grouped
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
    """Losses [K, P]; arguments as `mask_bce`, already checked, fp32 or float64. No double backward."""
    return with_gradient(losses_and_gradient, cells, pairs, masks)


def with_gradient(compute: Callable, cells: Tensor, pairs: GridPairs, masks: PackedMasks) -> Tensor:
    """The losses of `compute`, differentiable.

    compute: (cells, pairs, masks, want_gradient) -> losses [K, P]; d loss / d cell [K, M], if wanted
    """
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
        upstream = grad_losses.repeat_interleave(table[:, 2] * table[:, 3], dim=1, output_size=gradient.shape[1])
        # A pair that nothing arrives at gets nothing, also where its gradient is NaN.
        return torch.where(upstream == 0, 0, gradient * upstream), *(None,) * 4


def losses_and_gradient(
    cells: Tensor, pairs: GridPairs, masks: PackedMasks, want: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [K, P] and, if wanted, d loss / d cell [K, M]."""
    num_sets = len(cells)
    if not cells.numel():
        return cells.new_empty(num_sets, len(pairs)), cells.new_empty(cells.shape) if want else None
    numbers, frames = pairs.mask_numbers, by_pair(cells, pairs)
    losses, gradients = [cells] * len(pairs), [cells] * len(pairs)
    weights = functools.cache(functools.partial(interpolation, like=cells))
    rows = functools.cache(lambda size, grid, frames: _rows(weights(size[0], grid[0]), size[1], frames))
    for (number, grid), members in grouped(pairs, lambda pair: (numbers[pair], pairs.sizes[pair])).items():
        size = masks.sizes[number]
        together = max(1, _most_frames(grid, size) // num_sets)
        for first in range(0, len(members), together):
            some = members[first : first + together]
            stacked = torch.stack([frames[pair] for pair in some]).view(-1, *grid)  # [n · K, h, w]
            upsampling = _Upsampling(stacked, weights(size[0], grid[0]), weights(size[1], grid[1]), want)
            loss, grad = _frames(upsampling, rows(size, grid, len(stacked)), masks, number, want)
            for pair, part in zip(some, loss.view(len(some), num_sets).unbind(), strict=True):
                losses[pair] = part
            if want:
                for pair, part in zip(some, grad.view(len(some), num_sets, -1).unbind(), strict=True):
                    gradients[pair] = part
    return torch.stack(losses, dim=1), torch.cat(gradients, dim=1) if want else None


def _frames(
    upsampling: _Upsampling, chunks: list[_Rows], masks: PackedMasks, number: int, want: bool
) -> tuple[Tensor, Tensor | None]:
    """n frames [h, w] against one mask: losses [n] and, if wanted, gradients [n, h, w]."""
    height, width = masks.sizes[number]
    across = upsampling.across
    num_frames, num_rows = len(across), max(rows.end - rows.first for rows in chunks)
    frames = max(1, _CHUNK_PIXELS_CPU // (num_rows * width)) if across.device.type == "cpu" else num_frames
    slots = min(-(-len(chunks) // _MULTIPLIED), max(1, _LOGARITHMS // (num_frames * num_rows * width)))
    together = slots * _MULTIPLIED  # chunks whose masks are prepared and whose logarithms are taken at once
    losses, arguments = across.new_zeros(num_frames), across.new_empty(slots, num_frames, num_rows, width)
    parts = upsampling.split(frames)
    places = [slot.split(frames) for slot in arguments]
    for start in range(0, len(chunks), together):
        some = chunks[start : start + together]
        unset = (~masks.rows(number, some[0].first, some[-1].end)).to(across.dtype)
        slopes = (2 * unset).sub_(1).mul_(1 - 2 * MARGIN)  # d argument of the logarithm / d p, with the sign changed
        lengths = [rows.end - rows.first for rows in some]
        arguments.fill_(1)
        for k, (rows, blank, slope) in enumerate(zip(some, unset.split(lengths), slopes.split(lengths), strict=True)):
            for part, place in zip(parts, places[k // _MULTIPLIED], strict=True):
                p = part.upsampled(rows)
                argument = torch.sub(blank, p, out=p).mul_(slope).add_(MARGIN)
                place[:, : lengths[k]] *= argument
                if want:
                    part.add_slopes(rows, slope / argument)
        arguments.log_()
        losses -= sum(torch.cat([logs.sum((-2, -1)) for logs in slot.split(frames)]) for slot in arguments)
    return losses / (height * width), upsampling.gradient() if want else None


def _most_frames(grid: tuple[int, int], mask: tuple[int, int]) -> int:
    """How many go together: they are held upsampled in x, and for a chunk of rows in full."""
    return _MOST_VALUES // max(grid[0] * mask[1], min(mask[0] * mask[1], _CHUNK_PIXELS_CPU))


class _Rows(NamedTuple):
    """The pixel rows [first, end), the rows of cells [low, high) they are interpolated from (at least two, if there
    are), the weights [end - first, high - low] and their columns."""

    first: int
    end: int
    low: int
    high: int
    weights: Tensor
    columns: tuple[Tensor, ...]


def _rows(down: Tensor, width: int, num_frames: int) -> list[_Rows]:
    """What is computed at a time, given the weights down [H, h]. On the CPU two rows of cells are enough for each, if
    there are several rows of pixels for a row of cells."""
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


class _Upsampling:
    """Frames [n, h, w] upsampled to [n, H, W] and slopes brought back to the cells, some pixel rows at a time."""

    def __init__(self, cells: Tensor, down: Tensor, columns: Tensor, want_gradient: bool) -> None:
        """Weights down [H, h] and columns [W, w], see `interpolation`."""
        self.down, self.columns = down, columns
        self.across = exact_product(cells, columns.t())  # [n, h, W]
        self.grad_across = torch.zeros_like(self.across) if want_gradient else None

    def split(self, frames: int) -> list[_Frames]:
        """So many frames at a time."""
        grads = [None] * len(self.across) if self.grad_across is None else self.grad_across.split(frames)
        return [_Frames(across, grad) for across, grad in zip(self.across.split(frames), grads, strict=False)]

    def gradient(self) -> Tensor:
        """[n, h, w], of the mean over the pixels."""
        return exact_product(self.grad_across, self.columns).div_(len(self.down) * len(self.columns))


class _Frames:
    """Some of the frames of an `_Upsampling`, with views made once of every row of cells."""

    def __init__(self, across: Tensor, grad_across: Tensor | None) -> None:
        self._across, self._grad = across, grad_across
        self._cells = across[:, :, None].unbind(1)  # [n, 1, W] each
        self._grads = () if grad_across is None else grad_across.unbind(1)  # [n, W] each

    def upsampled(self, rows: _Rows) -> Tensor:
        """[n, y, W]"""
        if len(rows.columns) == 2:
            before, after = rows.columns
            return torch.mul(before, self._cells[rows.low]).addcmul_(after, self._cells[rows.low + 1])
        return exact_product(rows.weights, self._across[:, rows.low : rows.high])

    def add_slopes(self, rows: _Rows, slope: Tensor) -> None:
        """d loss / d pixel [n, y, W]; it is used up."""
        if len(rows.columns) == 2:
            before, after = rows.columns
            self._grads[rows.low].add_((before * slope).sum(1))
            self._grads[rows.low + 1].add_(slope.mul_(after).sum(1))
        else:
            self._grad[:, rows.low : rows.high] += exact_product(rows.weights.mT, slope)


def interpolation(pixels: int, cells: int, like: Tensor) -> Tensor:
    """[pixels, cells]: the weights of the cells in every pixel of a row or column, from exact integers.

    In units of 1 / (2 · pixels) cell, pixel x lies at (2 x + 1) · cells - pixels.
    """
    place = (2 * torch.arange(pixels, device=like.device) + 1) * cells - pixels
    place = place.clamp(0, 2 * pixels * (cells - 1))[:, None]
    before = place // (2 * pixels)
    after = (place % (2 * pixels)).to(like.dtype) / (2 * pixels)
    cell = torch.arange(cells, device=like.device)
    return torch.where(cell == before, 1 - after, 0) + torch.where(cell == before + 1, after, 0)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in the precision of its operands, whatever fp32 products are set to.

    With weights of fewer bits a prediction could leave [0, 1], where a logarithm is NaN.
    """
    if a.dtype == torch.float64 or _exact_products(a.device):
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


def _exact_products(device: torch.device) -> bool:
    """Whether fp32 products are known to be made in IEEE precision."""
    if device.type != "cpu":
        return device.type != "cuda"
    if hasattr(torch.backends.mkldnn, "matmul"):
        return torch.backends.mkldnn.matmul.fp32_precision not in ("tf32", "bf16")
    return torch.get_float32_matmul_precision() == "highest"
