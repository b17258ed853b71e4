"""Pairs of a map row and a patch of it that is laid out as a grid, each to be compared with a mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

FIELDS = 8  # int32 columns of `GridPairs.table`: those of `PairColumns`, and two of zeros


class PairColumns(NamedTuple):
    """Columns of `GridPairs.table`, [P] each.

    Attributes:
        row: row of the maps.
        start: first column of the patch in the maps.
        height, width: of the grid.
        first_cell: index of the pair's first cell among the cells of all pairs.
        mask: index of the mask.
    """

    row: Tensor
    start: Tensor
    height: Tensor
    width: Tensor
    first_cell: Tensor
    mask: Tensor


class Run(NamedTuple):
    """A stretch of pairs with one grid size (h, w): slices of the pairs and of their cells."""

    pairs: slice
    cells: slice
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class GridPairs:
    """P pairs: h x w columns of a map row, in row-major order, and the index of a mask.

    Grids differ in size from pair to pair. The *cells* of all pairs, M = Σ h · w, lie one after the other in the order
    of the pairs: a tensor [..., M]. The sizes are Python numbers, so that launches and allocations follow from them
    without a look at the device.

    Attributes:
        table: [P, 8] int32, see `columns`.
        sizes: P times (h, w).
        disjoint: True if no column of a row is known to belong to two pairs; then a gradient of the maps can be
            written pair by pair.
    """

    table: Tensor
    sizes: tuple[tuple[int, int], ...]
    disjoint: bool = False

    @classmethod
    def from_rows(cls, row: Tensor, start: Tensor, sizes: list[tuple[int, int]], mask: Tensor) -> GridPairs:
        """Build from integer tensors [P] and P grid sizes (each side at least 1), on the device of `row`.

        `disjoint` is found out on the CPU only; on an accelerator it would have to be read back.
        """
        height, width = torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2).unbind(1)
        first_cell = torch.cumsum(height * width, dim=0) - height * width
        there = (t.to(row.device) for t in (height, width, first_cell))
        table = row.new_zeros(len(sizes), FIELDS, dtype=torch.int32)
        for column, values in zip(table.unbind(1), PairColumns(row, start, *there, mask), strict=False):
            column.copy_(values)
        disjoint = row.device.type == "cpu" and _are_disjoint(row, start, height * width)
        return cls(table, tuple(map(tuple, sizes)), disjoint)

    def __len__(self) -> int:
        """P, the number of pairs."""
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def columns(self) -> PairColumns:
        """The columns of the table by name, views."""
        return PairColumns(*self.table.unbind(1)[: len(PairColumns._fields)])

    @cached_property
    def num_cells(self) -> int:
        """M, the number of cells of all pairs."""
        return sum(height * width for height, width in self.sizes)

    @cached_property
    def mask_indices(self) -> tuple[int, ...]:
        """Each pair's mask, as Python numbers.

        Reads the table, once; on an accelerator that waits for the device, unless the pairs came there by `to`.
        """
        return tuple(self.columns.mask.tolist())

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Row and column in the maps of every cell, in the order of the pairs: two int64 [M]."""
        rows, columns = [self.table.new_empty(0).long()], [self.table.new_empty(0).long()]
        for pairs, _, (height, width) in self.runs():
            row, start = self.table[pairs, :2].long().unbind(1)
            cell = torch.arange(height * width, device=self.device)
            rows.append(row[:, None].expand(-1, height * width).flatten())
            columns.append((start[:, None] + cell).flatten())
        return torch.cat(rows), torch.cat(columns)

    def runs(self) -> Iterator[Run]:
        """Yield the stretches of pairs with one grid size, in order."""
        first_pair = first_cell = 0
        for pair, size in enumerate(self.sizes, start=1):
            if pair == len(self.sizes) or self.sizes[pair] != size:
                end_cell = first_cell + (pair - first_pair) * size[0] * size[1]
                yield Run(slice(first_pair, pair), slice(first_cell, end_cell), size)
                first_pair, first_cell = pair, end_cell

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GridPairs:
        """Return the same pairs on another device."""
        return self.with_table(self.table.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GridPairs:
        """Return the same pairs in page-locked memory."""
        return self.with_table(self.table.pin_memory())

    def with_table(self, table: Tensor) -> GridPairs:
        """Return the same pairs with a copy of their table, on any device."""
        moved = GridPairs(table, self.sizes, self.disjoint)
        if self.device.type == "cpu" or "mask_indices" in self.__dict__:
            moved.__dict__["mask_indices"] = self.mask_indices
        return moved


def check_pairs(pairs: GridPairs, name: str, device: torch.device) -> None:
    """Check the type, table and device of pairs that go with tensors called `name` on `device`.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    if not isinstance(pairs, GridPairs):
        raise TypeError(f"pairs must be GridPairs, got {type(pairs).__name__}")
    if pairs.table.shape != (len(pairs), FIELDS) or pairs.table.dtype != torch.int32:
        raise ValueError(
            f"pairs.table must be int32 [P, {FIELDS}] for {len(pairs)} pairs, "
            f"got {pairs.table.dtype} {list(pairs.table.shape)}"
        )
    if pairs.device != device:
        raise ValueError(f"{name} are on {device}, pairs on {pairs.device}: move them with pairs.to(device)")


def _are_disjoint(row: Tensor, start: Tensor, length: Tensor) -> bool:
    """Return whether no two ranges [start, start + length) of one row overlap."""
    order = torch.argsort(start, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    row, start, end = row[order], start[order], (start + length)[order]
    return not bool(((row[1:] == row[:-1]) & (start[1:] < end[:-1])).any())
