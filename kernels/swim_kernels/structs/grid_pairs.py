"""Pairs of a map row and a patch of it that is laid out as a grid, each to be compared with a mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FIELDS = 8  # int32 columns of `GridPairs.table`


@dataclass(frozen=True, eq=False)
class GridPairs:
    """P pairs: h x w columns of a map row, in row-major order, and the number of a mask.

    Grids differ in size from pair to pair. The *cells* of all pairs, M = Σ h · w, lie one after the other in the order
    of the pairs: a tensor [..., M]. The sizes are Python numbers, so that launches and allocations follow from them
    without a look at the device.

    Attributes:
        table: [P, 8] int32: row of the maps, first column, height, width, first cell, mask, 0, 0.
        sizes: P times (h, w).
        disjoint: whether it is known that no column of a row belongs to two pairs; then a gradient of the maps can be
            written pair by pair.
    """

    table: Tensor
    sizes: tuple[tuple[int, int], ...]
    disjoint: bool = False

    @classmethod
    def of(cls, row: Tensor, start: Tensor, sizes: list[tuple[int, int]], mask: Tensor) -> GridPairs:
        """From tensors [P] of integers and P grid sizes (each side at least 1), on the device of `row`.

        `disjoint` is found out on the CPU only; on an accelerator it would have to be read back.
        """
        height, width = torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2).unbind(1)
        first = torch.cumsum(height * width, dim=0) - height * width
        zero = torch.zeros_like(height)
        there = (row, start, *(t.to(row.device) for t in (height, width, first)), mask)
        columns = [column.int() for column in (*there, zero.to(row.device), zero.to(row.device))]
        disjoint = row.device.type == "cpu" and _disjoint(row, start, height * width)
        return cls(torch.stack(columns, dim=1).contiguous(), tuple(map(tuple, sizes)), disjoint)

    def __len__(self) -> int:
        """P, the number of pairs."""
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @cached_property
    def num_cells(self) -> int:
        """M, the number of cells of all pairs."""
        return sum(height * width for height, width in self.sizes)

    @cached_property
    def mask_numbers(self) -> tuple[int, ...]:
        """The pairs' masks as Python numbers.

        Looks at the table, once; on an accelerator it waits for the device, unless the pairs came there by `to`.
        """
        return tuple(self.table[:, 5].tolist())

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Row and column in the maps of every cell, in the order of the pairs: two int64 [M]."""
        rows, columns = [self.table.new_empty(0).long()], [self.table.new_empty(0).long()]
        for which, _, (height, width) in self.runs():
            row, start = self.table[which, :2].long().unbind(1)
            cell = torch.arange(height * width, device=self.device)
            rows.append(row[:, None].expand(-1, height * width).flatten())
            columns.append((start[:, None] + cell).flatten())
        return torch.cat(rows), torch.cat(columns)

    def runs(self) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
        """Stretches of pairs with one grid size, in order: their pairs, their cells, (h, w)."""
        first_pair = first_cell = 0
        for pair, size in enumerate(self.sizes, start=1):
            if pair == len(self.sizes) or self.sizes[pair] != size:
                end_cell = first_cell + (pair - first_pair) * size[0] * size[1]
                yield slice(first_pair, pair), slice(first_cell, end_cell), size
                first_pair, first_cell = pair, end_cell

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GridPairs:
        """The same pairs on another device."""
        return self._like(self.table.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GridPairs:
        """The same pairs in page-locked memory."""
        return self._like(self.table.pin_memory())

    def _like(self, table: Tensor) -> GridPairs:
        moved = GridPairs(table, self.sizes, self.disjoint)
        if self.device.type == "cpu" or "mask_numbers" in self.__dict__:
            moved.__dict__["mask_numbers"] = self.mask_numbers
        return moved


def _disjoint(row: Tensor, start: Tensor, length: Tensor) -> bool:
    """Whether no two ranges [start, start + length) of one row overlap."""
    order = torch.argsort(start, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    row, start, end = row[order], start[order], (start + length)[order]
    return not bool(((row[1:] == row[:-1]) & (start[1:] < end[:-1])).any())
