"""Mask targets of a batch: which columns of which attention map should look like which mask.

Import the names from `swim_fast.loss.mask_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy
import torch
from torch import Tensor

from swim_kernels import GridPairs, PackedMasks
from swim_kernels.runtime import move_together, no_autocast, pin_together

# Pixels of masks unpacked at a time; an accelerator wants fewer, longer launches.
_CHUNK_PIXELS_CPU = 2**21
_CHUNK_PIXELS_ACCELERATOR = 2**25


@dataclass(frozen=True, eq=False)
class PairGroup:
    """Pairs of one grid and one mask size, whose frames and masks can be stacked.

    Attributes:
        grid: (h, w) of the patch.
        mask_size: (Hm, Wm) of the masks.
        mask_indices: indices into `MaskTargets.masks`, each once.
        masks_of_pairs: P_g indices into `MaskTargets.masks`, one for each pair.
        pairs: [P_g] int64, indices of the pairs.
        mask: [P_g] int64, each pair's mask as an index into `mask_indices`.
    """

    grid: tuple[int, int]
    mask_size: tuple[int, int]
    mask_indices: tuple[int, ...]
    masks_of_pairs: tuple[int, ...]
    pairs: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class MaskTargets:
    """Masks that the maps of one batch should look like: P pairs of (map row, supervised temporal patch).

    The constructor checks types and shapes and reads no value from a device; `check` reads the values.

    Attributes:
        row: [P] integer, row of the maps.
        start: [P] integer, first column of the patch in the row's key set.
        height, width: [P] integer, the patch's grid h x w in visual tokens, row-major from `start`.
        mask: [P] integer, index into `masks`; several pairs may share one mask.
        masks: uint8 or bool [Hm, Wm] each, sizes may differ; non-zero is the object. They move to a device bit-packed.
            `PackedMasks` are such a sequence.

    Raises:
        TypeError, ValueError: dtype, shape, length or device of a field does not fit; the field is named.
    """

    row: Tensor
    start: Tensor
    height: Tensor
    width: Tensor
    mask: Tensor
    masks: Sequence[Tensor]

    def __post_init__(self) -> None:
        for name, value in self._indices().items():
            if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"MaskTargets.{name} must be an int64 or int32 tensor [P], got {kind}")
            if value.dim() != 1 or value.shape != self.row.shape:
                raise ValueError(
                    f"MaskTargets.{name} has shape {list(value.shape)}, row has {list(self.row.shape)}: "
                    "all five are one-dimensional and of the same length P"
                )
            if value.device != self.row.device:
                raise ValueError(f"MaskTargets.{name} is on {value.device}, row on {self.row.device}: use .to(device)")
        if isinstance(self.masks, PackedMasks):
            if self.masks.device != self.row.device and len(self.masks):
                raise ValueError(
                    f"MaskTargets.masks are on {self.masks.device}, row on {self.row.device}: use .to(device)"
                )
            return
        for index, mask in enumerate(self.masks):
            if not isinstance(mask, Tensor) or mask.dtype not in (torch.uint8, torch.bool):
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"MaskTargets.masks[{index}] must be a uint8 or bool tensor [Hm, Wm], got {kind}")
            if mask.dim() != 2 or mask.numel() == 0:
                raise ValueError(f"MaskTargets.masks[{index}] must be [Hm, Wm] with pixels, got {list(mask.shape)}")
            if mask.device != self.row.device:
                raise ValueError(
                    f"MaskTargets.masks[{index}] is on {mask.device}, row on {self.row.device}: use .to(device)"
                )

    def _indices(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("row", "start", "height", "width", "mask")}

    def __len__(self) -> int:
        """Number of pairs P."""
        return len(self.row)

    @property
    def device(self) -> torch.device:
        return self.row.device

    def prepare(self) -> MaskTargets:
        """Sort the pairs and read the masks now, best in a worker on the CPU, and return self.

        `to`, `pin_memory` and pickles carry the results along.
        """
        _ = self.groups, self.cell_targets
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskTargets:
        """Return the targets on `device`, the masks bit-packed.

        They are prepared before the move, on the CPU: the loss would have to wait for the device.
        """
        return self._like(move_together(self._tensors(), device, non_blocking))

    def pin_memory(self) -> MaskTargets:
        """Return a copy in page-locked memory; `DataLoader(pin_memory=True)` calls it."""
        return self._like(pin_together(self._tensors()))

    def _tensors(self) -> list[Tensor]:
        of_masks = self.packed.bits, self.packed.table, self.pairs.table, self.cell_targets
        of_groups = [tensor for group in self.groups for tensor in (group.pairs, group.mask)]
        return [*self._indices().values(), *of_masks, *of_groups]

    def _like(self, tensors: list[Tensor]) -> MaskTargets:
        """Return the same targets with these copies of `_tensors()`."""
        row, start, height, width, mask, bits, table, pairs, cells, *of_groups = tensors
        moved = MaskTargets(row, start, height, width, mask, PackedMasks(bits, table, self.packed.sizes))
        # into the cache of the properties, so that nothing is read back from the device
        both = zip(self.groups, of_groups[::2], of_groups[1::2], strict=True)
        groups = tuple(replace(group, pairs=pairs, mask=mask) for group, pairs, mask in both)
        moved.__dict__.update(_table=self._table, groups=groups, pairs=self.pairs.with_table(pairs), cell_targets=cells)
        return moved

    def check(self, rows: int | None = None, columns: int | None = None) -> MaskTargets:
        """Check the values, best on the CPU before `to` (on a device it waits for it), and return self.

        Args:
            rows: R of the maps, if known.
            columns: N of the maps, if known.

        Raises:
            ValueError: an index, a grid size or a patch reaches outside; pair, value and limit are named.
        """
        _check_range("row", self.row, 0, rows)
        _check_range("height", self.height, 1)
        _check_range("width", self.width, 1)
        _check_range("mask", self.mask, 0, len(self.masks))
        _check_range("start", self.start, 0)
        if columns is not None:
            _check_range("start + height * width", self.start + self.height * self.width, 1, columns + 1)
        return self

    @cached_property
    def _table(self) -> list[list[int]]:
        """P times height, width, mask. Read once if they are on a device; `to` copies them from the CPU.

        Raises:
            ValueError: a grid size below 1 or a mask index without a mask.
        """
        table = torch.stack([self.height.long(), self.width.long(), self.mask.long()], dim=1).tolist()
        for pair, (height, width, mask) in enumerate(table):
            if height < 1 or width < 1:
                raise ValueError(f"MaskTargets: pair {pair} has a grid of {height} x {width}; both must be at least 1")
            if not 0 <= mask < len(self.masks):
                raise ValueError(f"MaskTargets: pair {pair} asks for mask {mask} of {len(self.masks)}")
        return table

    @cached_property
    def packed(self) -> PackedMasks:
        """The masks, bit-packed."""
        return self.masks if isinstance(self.masks, PackedMasks) else PackedMasks.pack(self.masks)

    @cached_property
    def pairs(self) -> GridPairs:
        """The same pairs in the form that the kernels take."""
        sizes = [(height, width) for height, width, _ in self._table]
        return GridPairs.from_rows(self.row, self.start, sizes, self.mask)

    @cached_property
    def groups(self) -> tuple[PairGroup, ...]:
        """The pairs by (h, w, Hm, Wm), in order of first appearance.

        Raises:
            ValueError: a grid size below 1 or a mask index without a mask.
        """
        members: dict[tuple[int, int, int, int], list[int]] = {}
        for pair, (height, width, mask) in enumerate(self._table):
            members.setdefault((height, width, *self.packed.sizes[mask]), []).append(pair)
        groups = []
        for (height, width, *mask_size), pairs in members.items():
            local: dict[int, int] = {}
            mask = [local.setdefault(self._table[pair][2], len(local)) for pair in pairs]
            groups.append(
                PairGroup(
                    grid=(height, width),
                    mask_size=(mask_size[0], mask_size[1]),
                    mask_indices=tuple(local),
                    masks_of_pairs=tuple(self._table[pair][2] for pair in pairs),
                    pairs=torch.tensor(pairs, device=self.device),
                    mask=torch.tensor(mask, device=self.device),
                )
            )
        return tuple(groups)

    @cached_property
    def cell_targets(self) -> Tensor:
        """Return the target of every cell, in the order of `pairs`: fp32 [2, M].

        The masked share of its area, see `average_mask`, and 1 if the pixel under its centre is masked, else 0.
        """
        return self._read_masks(
            lambda masks, grid: torch.stack([average_mask(masks, grid), _at_cell_centres(masks, grid).float()]),
            torch.empty(2, self.pairs.num_cells, device=self.device),
        )

    def cell_shares(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the masked share of every cell [M], in fp32 or float64, which alone is not kept."""
        if dtype == torch.float32:
            return self.cell_targets[0]
        out = torch.empty(1, self.pairs.num_cells, dtype=dtype, device=self.device)
        return self._read_masks(lambda masks, grid: average_mask(masks, grid, dtype)[None], out)[0]

    def _read_masks(self, read: Callable[[Tensor, tuple[int, int]], Tensor], out: Tensor) -> Tensor:
        """Write to out [k, M] what `read` finds in some masks [n, Hm, Wm] for one grid: [k, n, h, w]."""
        for group in self.groups:
            found = torch.cat([read(masks, group.grid) for masks in self.mask_chunks(group)], dim=1)
            out.index_copy_(1, self._cells_of(group), found.index_select(1, group.mask).flatten(1))
        return out

    def frames(self, group: PairGroup, cells: Tensor) -> Tensor:
        """Return the frames of one group, [..., P_g, h, w], from cells [..., M] in the order of `pairs`."""
        return cells.index_select(-1, self._cells_of(group)).unflatten(-1, (len(group.pairs), *group.grid))

    def _cells_of(self, group: PairGroup) -> Tensor:
        """Return the indices of a group's cells, pair by pair: [P_g · h · w]."""
        first = self.pairs.columns.first_cell.long().index_select(0, group.pairs)
        return (first[:, None] + torch.arange(group.grid[0] * group.grid[1], device=self.device)).flatten()

    @property
    def chunk_pixels(self) -> int:
        """Pixels of masks to be unpacked at a time."""
        return _CHUNK_PIXELS_CPU if self.device.type == "cpu" else _CHUNK_PIXELS_ACCELERATOR

    def mask_chunks(self, group: PairGroup) -> Iterator[Tensor]:
        """Yield the group's masks in the order of `mask_indices`, a few at a time: bool [n, Hm, Wm]."""
        step = max(1, self.chunk_pixels // (group.mask_size[0] * group.mask_size[1]))
        for first in range(0, len(group.mask_indices), step):
            yield self.packed.unpack(group.mask_indices[first : first + step])


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
    columns = _integer_overlaps(width, grid[1], masks.device).to(dtype)  # [w, Wm]
    with no_autocast(masks.device.type):  # 16 bits do not hold the integers
        if masks.device.type == "cpu":
            sums = _sum_rows(masks, grid[0], dtype)
        else:
            sums = _integer_overlaps(height, grid[0], masks.device).to(dtype) @ masks.to(dtype)
        return sums @ columns.T / (height * width)


def _sum_rows(masks: Tensor, cells: int, dtype: torch.dtype) -> Tensor:
    """Return Σ_i overlap[c, i] · masks[..., i, :] as [..., cells, Wm], on the CPU, with `_integer_overlaps`.

    Pixels are added up as bytes: a product of matrices would first make each of them a floating-point number.
    """
    pixels = masks.numpy().view(numpy.uint8)
    height = pixels.shape[-2]
    sums = torch.empty(*masks.shape[:-2], cells, masks.shape[-1], dtype=dtype)
    out = sums.numpy()
    for cell in range(cells):
        first, last = cell * height // cells, ((cell + 1) * height - 1) // cells  # pixels that the cell touches
        kind = numpy.uint16 if last - first < 2**16 - 1 else numpy.uint32
        out[..., cell, :] = cells * numpy.add.reduce(pixels[..., first : last + 1, :], -2, kind).astype(out.dtype)
        for pixel, outside in (
            (first, cell * height - first * cells),
            (last, (last + 1) * cells - (cell + 1) * height),
        ):
            if outside:
                out[..., cell, :] -= outside * pixels[..., pixel, :].astype(out.dtype)
    return sums


def _integer_overlaps(pixels: int, cells: int, device: torch.device) -> Tensor:
    """[cells, pixels] int64: length of cell c that pixel i covers, in units of 1/cells pixel."""
    pixel = torch.arange(pixels, device=device) * cells
    cell = torch.arange(cells, device=device)[:, None] * pixels
    return (torch.minimum(pixel + cells, cell + pixels) - torch.maximum(pixel, cell)).clamp_min(0)


def _at_cell_centres(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the pixel under each cell's centre: bool [..., Hm, Wm] -> [..., h, w]."""
    rows, columns = (
        (2 * torch.arange(cells, device=masks.device) + 1) * pixels // (2 * cells)
        for cells, pixels in zip(grid, masks.shape[-2:], strict=True)
    )
    return masks[..., rows[:, None], columns]


def _check_range(name: str, values: Tensor, low: int, high: int | None = None) -> None:
    """Raise ValueError unless low <= values < high."""
    bad = values < low if high is None else (values < low) | (values >= high)
    if bad.any():
        pair = int(bad.nonzero()[0, 0])
        limit = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"MaskTargets: pair {pair} has {name} = {int(values[pair])}, must be {limit}")
