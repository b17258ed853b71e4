"""Mask BCE in torch operations, on any device, with little memory: the pixels are worked through in chunks of rows.

The upsampling is separable, u = Ry c Rxᵀ with matrices Ry [H, h] and Rx [W, w] of at most two weights a row. The
gradient of the cells is made in the same pass and is all that is kept for backward:

    ∂c = Ryᵀ s Rx / (H W)                      s = d loss / d u of every pixel
    s  = (1 - 2 · 1e-6) (1 - 2 m) / v          "stable", v the argument of the logarithm
    s  = (u - m) / max(u (1 - u), 1e-12)       "paper"

All pairs of one mask and one grid size go together: a chunk of the mask is unpacked once for them, small enough to stay
in a core's cache. Deterministic: chunks depend on shapes only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swim_kernels.grid_pairs import GridPairs
from swim_kernels.mask_bce.reference import LEAST_VARIANCE, LOWEST_LOG, MARGIN, by_pair, grouped
from swim_kernels.packed_masks import PackedMasks

# Pixels computed at a time. On the CPU a core's cache holds them, and torch does not divide them among threads, which
# on this scale costs more than it gives (and very much where the cores are busy). A GPU wants fewer, longer launches.
_CHUNK_PIXELS_CPU = 2**15 - 1
_CHUNK_PIXELS_ACCELERATOR = 2**24
_LOGARITHMS = 2**20  # taken at a time: they are always divided among threads
_FEW_ROWS = 4  # of cells: up to so many are added one by one, since matrix products are divided among threads
_MOST_VALUES = 2**21  # of frames that share an unpacked chunk of their mask


def mask_bce_torch(cells: Tensor, pairs: GridPairs, masks: PackedMasks, numerics: str) -> Tensor:
    """Losses [K, P]; arguments as `mask_bce`, already checked, fp32 or float64. No double backward."""
    return with_gradient(losses_and_gradient, cells, pairs, masks, numerics)


def with_gradient(compute: Callable, cells: Tensor, pairs: GridPairs, masks: PackedMasks, numerics: str) -> Tensor:
    """The losses of `compute`, differentiable.

    compute: (cells, pairs, masks, numerics, want_gradient) -> losses [K, P]; d loss / d cell [K, M], if wanted
    """
    want = torch.is_grad_enabled() and cells.requires_grad
    return _MaskBCE.apply(cells, compute, pairs, masks, numerics, want)


class _MaskBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cells, compute, pairs, masks, numerics, want):
        ctx.set_materialize_grads(False)
        losses, gradient = compute(cells, pairs, masks, numerics, want)
        if want:
            ctx.save_for_backward(gradient, pairs.table)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        if grad_losses is None:
            return (None,) * 6
        gradient, table = ctx.saved_tensors
        upstream = grad_losses.repeat_interleave(table[:, 2] * table[:, 3], dim=1, output_size=gradient.shape[1])
        # A pair that nothing arrives at gets nothing, also where its gradient is NaN.
        return torch.where(upstream == 0, 0, gradient * upstream), *(None,) * 5


def losses_and_gradient(
    cells: Tensor, pairs: GridPairs, masks: PackedMasks, numerics: str, want: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [K, P] and, if wanted, d loss / d cell [K, M]."""
    num_sets = len(cells)
    if not cells.numel():
        return cells.new_empty(num_sets, len(pairs)), cells.new_empty(cells.shape) if want else None
    numbers, frames = pairs.mask_numbers, by_pair(cells, pairs)
    losses, gradients = [cells] * len(pairs), [cells] * len(pairs)
    weights = functools.cache(functools.partial(interpolation, like=cells))
    for (number, grid), members in grouped(pairs, lambda pair: (numbers[pair], pairs.sizes[pair])).items():
        size = masks.sizes[number]
        together = max(1, _most_frames(grid, size) // num_sets)
        for first in range(0, len(members), together):
            some = members[first : first + together]
            stacked = torch.stack([frames[pair] for pair in some]).view(-1, *grid)  # [n · K, h, w]
            upsampling = _Upsampling(stacked, weights(size[0], grid[0]), weights(size[1], grid[1]), want)
            loss, grad = _frames(upsampling, masks, number, numerics, want)
            for pair, part in zip(some, loss.view(len(some), num_sets).unbind(), strict=True):
                losses[pair] = part
            if want:
                for pair, part in zip(some, grad.view(len(some), num_sets, -1).unbind(), strict=True):
                    gradients[pair] = part
    return torch.stack(losses, dim=1), torch.cat(gradients, dim=1) if want else None


def _frames(
    upsampling: _Upsampling, masks: PackedMasks, number: int, numerics: str, want: bool
) -> tuple[Tensor, Tensor | None]:
    """n frames [h, w] against one mask: losses [n] and, if wanted, gradients [n, h, w]."""
    height, width = masks.sizes[number]
    prepare, compare = (_prepare_stable, _stable) if numerics == "stable" else (_prepare_paper, _paper)
    across = upsampling.across
    num_frames = len(across)
    rows, frames = _chunk(num_frames, height, width, across.device)
    block = rows * max(1, _LOGARITHMS // (num_frames * rows * width))
    losses, space = across.new_zeros(num_frames), across.new_empty(num_frames, min(block, height), width)
    for top in range(0, height, block):
        arguments = space[:, : height - top]  # of the logarithms
        for first in range(top, top + arguments.shape[1], rows):
            end = min(first + rows, height)
            mask = prepare(masks.rows(number, first, end), across.dtype)
            for frame in range(0, num_frames, frames):
                some = slice(frame, frame + frames)
                p = arguments[some, first - top : end - top]
                upsampling.rows(some, first, end, out=p)
                slope, lost = compare(p, *mask, want)
                losses[some] -= lost
                if want:
                    upsampling.add_slopes(some, first, end, slope)
        losses -= _sums(arguments.log_(), rows, frames, LOWEST_LOG if numerics == "paper" else None)
    return losses / (height * width), upsampling.gradient() if want else None


def _sums(logarithms: Tensor, rows: int, frames: int, lowest: float | None) -> Tensor:
    """[n] of [n, y, x], in chunks and from a least value on."""

    def total(chunk: Tensor) -> Tensor:
        return (chunk if lowest is None else chunk.clamp_min_(lowest)).sum((-2, -1))

    return torch.cat([sum(map(total, some.split(rows, dim=1))) for some in logarithms.split(frames)])


def _most_frames(grid: tuple[int, int], mask: tuple[int, int]) -> int:
    """How many go together: they are held upsampled in x, and for a chunk of rows in full."""
    return _MOST_VALUES // max(grid[0] * mask[1], min(mask[0] * mask[1], _CHUNK_PIXELS_CPU))


def _chunk(num_frames: int, height: int, width: int, device: torch.device) -> tuple[int, int]:
    """How many pixel rows, and of how many frames, at a time."""
    if device.type != "cpu":
        return min(height, max(1, _CHUNK_PIXELS_ACCELERATOR // (num_frames * width))), num_frames
    num_rows = min(height, max(1, _CHUNK_PIXELS_CPU // width))
    return num_rows, max(1, _CHUNK_PIXELS_CPU // (num_rows * width))


class _Upsampling:
    """Frames [n, h, w] upsampled to [n, H, W] and slopes brought back to the cells, some pixel rows at a time."""

    def __init__(self, cells: Tensor, down: Tensor, columns: Tensor, want_gradient: bool) -> None:
        """Weights down [H, h] and columns [W, w], see `interpolation`."""
        self.down, self.columns = down, columns
        self.across = exact_product(cells, columns.t())  # [n, h, W]
        self.grad_across = torch.zeros_like(self.across) if want_gradient else None

    def rows(self, some: slice, first: int, end: int, out: Tensor) -> None:
        """Of some frames the pixel rows [first, end), into [frames, end - first, W]."""
        used = self._used(first, end)
        weights, across = self.down[first:end, used], self.across[some, used]
        if weights.shape[1] > _FEW_ROWS:
            out.copy_(exact_product(weights, across))
            return
        torch.mul(weights[:, :1], across[:, :1], out=out)
        for k in range(1, weights.shape[1]):
            out.addcmul_(weights[:, k : k + 1], across[:, k : k + 1])

    def add_slopes(self, some: slice, first: int, end: int, slope: Tensor) -> None:
        """d loss / d pixel [frames, end - first, W] of the same."""
        used = self._used(first, end)
        weights, total = self.down[first:end, used], self.grad_across[some, used]
        if weights.shape[1] > _FEW_ROWS:
            total += exact_product(weights.mT, slope)
            return
        for k in range(weights.shape[1]):
            total[:, k] += (weights[:, k : k + 1] * slope).sum(1)

    def gradient(self) -> Tensor:
        """[n, h, w], of the mean over the pixels."""
        return exact_product(self.grad_across, self.columns).div_(len(self.down) * len(self.columns))

    def _used(self, first: int, end: int) -> slice:
        """The cell rows that have weights in the pixel rows [first, end)."""
        pixels, cells = self.down.shape
        low, high = (max(0, (2 * y + 1) * cells - pixels) // (2 * pixels) for y in (first, end - 1))
        return slice(min(low, cells - 1), min(high + 2, cells))


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


def _prepare_stable(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of a mask [y, x]: its complement, and d argument of the logarithm / d p with the sign changed."""
    unset = (~mask).to(dtype)
    return unset, (2 * unset).sub_(1).mul_(1 - 2 * MARGIN)


def _stable(p: Tensor, unset: Tensor, slope: Tensor, want: bool) -> tuple[Tensor | None, float]:
    """Makes the arguments of the logarithms of p [n, y, x], in place; slopes, if wanted, and what to add to the sum of
    the logarithms."""
    torch.sub(unset, p, out=p).mul_(slope).add_(MARGIN)
    return slope / p if want else None, 0.0


def _prepare_paper(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of a mask [y, x]: itself and its complement, in numbers."""
    return mask.to(dtype), (~mask).to(dtype)


def _paper(p: Tensor, target: Tensor, unset: Tensor, want: bool) -> tuple[Tensor | None, Tensor]:
    """As `_stable`."""
    rest = 1 - p
    argument = (target * p).addcmul_(unset, rest)
    # log(1 - p) with the digits that 1 - p has lost; they are none at p = 1
    lost = (1 - rest).sub_(p).mul_(unset).div_(argument.clamp_min(1e-30)).sum((-2, -1))
    slope = (p - target).div_(rest.mul_(p).clamp_min_(LEAST_VARIANCE)) if want else None
    p.copy_(argument)
    return slope, lost


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
