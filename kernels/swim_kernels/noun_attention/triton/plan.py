"""What the Triton kernels of noun attention need to know about a batch, prepared once for all of its layers.

Made by tensor operations on the device, in sizes that follow from shapes: nothing is read back.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swim_kernels.structs.noun_queries import NounQueries

_FIELDS = 8  # int32 columns of `entries` and of a table of blocks


class Plan(NamedTuple):
    """int32 tables; an *entry* is a row, in the order of sequence, key set and key_start.

    Attributes:
        entries: [R, 8] row, sequence, position, key_start, key_end, key_set, next entry of the same token (−1: none),
            1 if it is the first of its token.
        sequences: [B, 8] for every sequence: itself, first and end entry, first and end key in reach of its rows, 0 …
            (first ≥ end where there is none, as in the tables below).
        blocks: [·, 8] the same for blocks of at most `block_rows` entries of one sequence, padded with empty ones.
        read_blocks: [·, 8] the same for blocks of one sequence and key set, which is the field after the keys.
        key_sets: [G, N]
        inverse: [G, L] the first column that names the key, −1 if there is none.
        next_column: [G, N] the next column that names the same key, −1 if there is none.
        repeats: [1] how many columns at most name a key, less one.
    """

    entries: Tensor
    sequences: Tensor
    blocks: Tensor
    read_blocks: Tensor
    key_sets: Tensor
    inverse: Tensor
    next_column: Tensor
    repeats: Tensor


_plans: WeakKeyDictionary[NounQueries, dict[tuple, Plan]] = WeakKeyDictionary()


def plan_of(queries: NounQueries, batch: int, length: int, block_rows: int) -> Plan:
    """The plan of these rows for tiles of `block_rows` rows; made at the first call, then remembered.

    It is remembered for the object, as long as that lives, and made anew if one of its tensors was written to. A plan
    made while a CUDA graph is captured is part of the graph and is not mixed up with one made before.
    """
    if torch.compiler.is_compiling():
        return make_plan(*queries.tensors(), batch, length, block_rows)
    capturing = queries.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    versions = tuple(tensor._version for tensor in queries.tensors() if not tensor.is_inference())
    plans = _plans.setdefault(queries, {})
    which = (batch, length, block_rows, capturing, versions)
    if which not in plans:
        plans[which] = make_plan(*queries.tensors(), batch, length, block_rows)
    return plans[which]


def make_plan(
    sequence: Tensor,
    position: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    key_set: Tensor,
    key_sets: Tensor,
    batch: int,
    length: int,
    block_rows: int,
) -> Plan:
    """Values that do not fit B sequences of L tokens are forced into range: wrong maps, but no wild memory access."""
    num_rows = len(sequence)
    if not num_rows or not key_sets.numel():
        nothing = sequence.new_zeros(num_rows, _FIELDS, dtype=torch.int32)
        return Plan(nothing, nothing, nothing, nothing, key_sets.int(), nothing, nothing, nothing)
    order = torch.arange(num_rows, device=sequence.device)
    for values in (key_start, key_set, sequence):  # the last one decides; ties keep the order before
        order = order[torch.argsort(values[order], stable=True)]
    sequence, position, key_start, key_end, key_set = (
        values[order].long() for values in (sequence, position, key_start, key_end, key_set)
    )
    sequence, position = sequence.clamp(0, batch - 1), position.clamp(0, length - 1)
    key_start, key_end, key_set = key_start.clamp(min=0), key_end.clamp(max=length), key_set.clamp(0, len(key_sets) - 1)
    key_sets = torch.where(key_sets < length, key_sets, -1)
    next_entry, is_first = _same_token(sequence, position)
    fields = (order, sequence, position, key_start, key_end, key_set, next_entry, is_first)

    empty = key_start >= key_end
    reach = (torch.where(empty, length, key_start), torch.where(empty, 0, key_end))
    index, count = _cut((sequence,), block_rows, batch)
    blocks = _table(index, count, sequence, key_set, reach, length)
    index, count = _cut((sequence, key_set), block_rows, batch * len(key_sets))
    read_blocks = _table(index, count, sequence, key_set, reach, length)
    sequences = _table(sequence, batch, sequence, key_set, reach, length)
    sequences[:, 0] = torch.arange(batch, device=order.device)
    entries = torch.stack(fields, dim=1).int()
    return Plan(entries, sequences, blocks, read_blocks, *_columns(key_sets, length))


def num_blocks(num_rows: int, block_rows: int, segments: int) -> int:
    """How many blocks of at most `block_rows` rows there can be if each is within one of so many segments."""
    segments = min(num_rows, segments)
    return (num_rows + segments * (block_rows - 1)) // block_rows


def _cut(keys: tuple[Tensor, ...], block_rows: int, segments: int) -> tuple[Tensor, int]:
    """Cuts the entries where a key changes, and then every `block_rows`: block [R] of each entry, number of blocks."""
    entry = torch.arange(len(keys[0]), device=keys[0].device)
    starts = entry == 0
    for key in keys:
        starts |= key != key.roll(1)
    within = entry - torch.where(starts, entry, 0).cummax(dim=0).values
    block = (within % block_rows == 0).cumsum(dim=0) - 1
    return block, num_blocks(len(entry), block_rows, segments)


def _table(
    block: Tensor, count: int, sequence: Tensor, key_set: Tensor, reach: tuple[Tensor, Tensor], length: int
) -> Tensor:
    """[count, 8] int32: sequence, first and end entry, first and end key, key set, 0, 0 of blocks of entries."""
    entry = torch.arange(len(block), device=block.device)

    def least(values, nothing):
        return values.new_full((count,), nothing).scatter_reduce_(0, block, values, "amin")

    def largest(values):
        return values.new_zeros(count).scatter_reduce_(0, block, values, "amax")

    zero = entry.new_zeros(count)
    columns = (
        largest(sequence),
        least(entry, len(block)),
        largest(entry + 1),
        least(reach[0], length),
        largest(reach[1]),
        largest(key_set),
        zero,
        zero,
    )
    return torch.stack(columns, dim=1).int()


def _same_token(sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Of each entry the next one on the same token, −1 if it is the last, and whether it is the first."""
    same = (sequence[:, None] == sequence) & (position[:, None] == position)  # [R, R]
    entry = torch.arange(len(sequence), device=sequence.device)
    later = torch.where(same & (entry > entry[:, None]), entry, len(entry)).amin(dim=1)
    earlier = (same & (entry < entry[:, None])).any(dim=1)
    return torch.where(later == len(entry), -1, later), (~earlier).long()


def _columns(key_sets: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """key_sets, inverse, next_column, repeats"""
    num_sets, num_columns = key_sets.shape
    keys = torch.where(key_sets < 0, length, key_sets).long()  # the padding names a key of its own, cut off again
    column = torch.arange(num_columns, device=keys.device).expand(num_sets, -1)
    inverse = torch.full((num_sets, length + 1), num_columns, device=keys.device)
    inverse = inverse.scatter_reduce_(1, keys, column, "amin")[:, :length]
    inverse = torch.where(inverse == num_columns, -1, inverse)

    keys, order = torch.sort(keys, dim=1, stable=True)  # columns of one key side by side, in order
    repeated = (keys == keys.roll(1, dims=1)) & (column > 0) & (keys < length)
    next_column = torch.full_like(order, -1)
    next_column.scatter_(1, order.roll(1, dims=1), torch.where(repeated, order, -1))
    # How far a column is from the last one that named a new key.
    repeats = (column - torch.where(repeated, -1, column).cummax(dim=1).values).amax().reshape(1)
    return key_sets.int().contiguous(), inverse.int().contiguous(), next_column.int(), repeats.int()
