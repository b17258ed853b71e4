"""Inverse of the key sets: the columns that name each key, for kernels that walk along the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyColumns(NamedTuple):
    """Columns of G key sets [G, N] by the keys that they name, of L.

    Attributes:
        key_sets: int32 [G, N], −1 for what is no key.
        next_column: int32 [G, N] the next column of the set that names the same key, −1 if there is none.
        repeats: int32 [1] how many columns at most name a key, less one.
        column, slot: int32 and int64 [G · N] the columns, in the order of their keys, and where to note them in the
            flattened [G, L]: at their key if they are the first to name it, else behind the end.
    """

    key_sets: Tensor
    next_column: Tensor
    repeats: Tensor
    column: Tensor
    slot: Tensor

    def invert(self, length: int) -> Tensor:
        """Return the first column that names each key, −1 if there is none: int32 [G, L]."""
        end = len(self.key_sets) * length
        inverse = torch.full((end + 1,), -1, dtype=torch.int32, device=self.slot.device)
        return inverse.scatter_(0, self.slot, self.column)[:end].view(-1, length)


def find_key_columns(key_sets: Tensor, length: int) -> KeyColumns:
    """Return the columns of key sets [G, N] for sequences of L keys; nothing is read back from a device."""
    num_sets, num_columns = key_sets.shape
    if not key_sets.numel():
        nothing = key_sets.int()
        return KeyColumns(nothing, nothing, nothing.new_zeros(1), nothing.flatten(), nothing.flatten().long())
    is_key = (key_sets >= 0) & (key_sets < length)
    keys = torch.where(is_key, key_sets, length).long()  # what is no key names one of its own
    column = torch.arange(num_columns, device=keys.device).expand(num_sets, -1)

    keys, order = torch.sort(keys, dim=1, stable=True)  # columns of one key side by side, in order
    repeated = (keys == keys.roll(1, dims=1)) & (column > 0) & (keys < length)
    next_column = torch.full_like(order, -1)
    next_column.scatter_(1, order.roll(1, dims=1), torch.where(repeated, order, -1))
    # How far a column is from the last one that named a new key.
    repeats = (column - torch.where(repeated, -1, column).cummax(dim=1).values).amax().reshape(1)
    first_slot = torch.arange(num_sets, device=keys.device)[:, None] * length
    slot = torch.where(repeated | (keys == length), num_sets * length, first_slot + keys)
    return KeyColumns(
        torch.where(is_key, key_sets, -1).int().contiguous(),
        next_column.int(),
        repeats.int(),
        order.int().flatten(),
        slot.flatten(),
    )


def find_members(sets: Tensor, length: int) -> Tensor:
    """Return True for those of `length` keys that a set [..., N] names: bool [..., L]."""
    found = torch.zeros(*sets.shape[:-1], length + 1, dtype=torch.bool, device=sets.device)
    return found.scatter_(-1, torch.where((sets >= 0) & (sets < length), sets, length).long(), True)[..., :length]
