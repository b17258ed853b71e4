"""Tables of a batch for the Triton kernels of the rows, made once for all of its layers.

Made by tensor operations in sizes that follow from shapes, so that nothing is read back: on the CPU where the rows came
from there, and moved in one copy, since each operation on a few numbers would be a launch; else on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swim_kernels.runtime.transfer import move_together
from swim_kernels.structs.key_columns import KeyColumns
from swim_kernels.structs.noun_queries import NounQueries

_WIDTH = 8  # int32 columns of `entries` and of a table of blocks


class Entries(NamedTuple):
    """Columns of `Plan.entries`, [R] each; an *entry* is a row, in the order of sequence, key set and key_start.

    Attributes:
        row: the row of the maps.
        sequence, position: its token.
        key_start, key_end: keys that its softmax reaches: its range, or the span of its key set.
        key_set: the key set it is read out on.
        next: the next entry of the same token, −1 if there is none.
        is_first: 1 if it is the first of its token.
    """

    row: Tensor
    sequence: Tensor
    position: Tensor
    key_start: Tensor
    key_end: Tensor
    key_set: Tensor
    next: Tensor
    is_first: Tensor


class Blocks(NamedTuple):
    """Columns of the tables of blocks; neighbouring entries of one sequence are a block.

    Attributes:
        sequence: of its entries.
        first, end: its entries; first ≥ end if it has none.
        first_key, end_key: keys in reach of any of them.
        key_set: of its entries, where they have one in common.
    """

    sequence: Tensor
    first: Tensor
    end: Tensor
    first_key: Tensor
    end_key: Tensor
    key_set: Tensor


class Plan(NamedTuple):
    """int32 tables.

    Attributes:
        entries: [R, 8], columns of `Entries`.
        sequences: [B, 8], columns of `Blocks`: every sequence with all of its entries.
        blocks: [·, 8] the same for blocks of at most `block_rows` entries, padded with empty ones: entries with another
            key set than the one before begin a new block if their keys are others too, or the softmax is over key sets.
        read_blocks: [·, 8] the same for blocks of one key set.
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
    """Return the plan of these rows for tiles of `block_rows` rows; made at the first call, then remembered.

    It is remembered for the object, as long as that lives, and made anew if one of its tensors was written to. A plan
    made while a CUDA graph is captured is part of the graph and is not mixed up with one made before.
    """
    if torch.compiler.is_compiling():
        return make_plan(queries, batch, length, block_rows)
    capturing = queries.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    plans = _plans.setdefault(queries, {})
    which = (batch, length, block_rows, capturing, queries.versions())
    if which not in plans:
        source = queries.source
        if source is None:
            plans[which] = make_plan(queries, batch, length, block_rows)
        else:
            plans[which] = _move(_tables(source, batch, length, block_rows), length, queries.device)
    return plans[which]


def make_plan(queries: NounQueries, batch: int, length: int, block_rows: int) -> Plan:
    """Return the plan of these rows, on their device.

    Values that do not fit B sequences of L tokens are forced into range: wrong maps, but no wild memory access.
    """
    return _complete(*_tables(queries, batch, length, block_rows), length)


def _complete(tables: tuple[Tensor, ...], columns: KeyColumns, length: int) -> Plan:
    return Plan(*tables, columns.key_sets, columns.invert(length), columns.next_column, columns.repeats)


def _move(made: tuple[tuple[Tensor, ...], KeyColumns], length: int, device: torch.device) -> Plan:
    """Return the plan of tables that were made on the CPU: one copy and two launches, for what may be large."""
    tables, columns = made
    moved = move_together([*tables, *columns], device)
    return _complete(tuple(moved[: len(tables)]), KeyColumns(*moved[len(tables) :]), length)


def _tables(
    queries: NounQueries, batch: int, length: int, block_rows: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], KeyColumns]:
    """Return the first four fields of a plan, and the columns from which the others are made."""
    num_rows, key_sets = len(queries), queries.key_sets
    if not num_rows:
        return (key_sets.new_zeros(num_rows, _WIDTH, dtype=torch.int32),) * 4, queries.key_columns(length)
    key_sets = torch.where(key_sets < length, key_sets, -1)
    bounded = replace(queries, key_sets=key_sets, key_set=queries.key_set.clamp(0, len(key_sets) - 1))
    order = torch.arange(num_rows, device=key_sets.device)
    for values in (bounded.reach()[0], bounded.key_set, queries.sequence):  # the last one decides; ties keep the order
        order = order[torch.argsort(values[order], stable=True)]
    sequence, position, key_set, key_start, key_end = (
        values[order].long() for values in (queries.sequence, queries.position, bounded.key_set, *bounded.reach())
    )
    sequence, position = sequence.clamp(0, batch - 1), position.clamp(0, length - 1)
    key_start, key_end = key_start.clamp(min=0), key_end.clamp(max=length)
    entries = Entries(order, sequence, position, key_start, key_end, key_set, *_same_token(sequence, position))

    starts_sequence = sequence != sequence.roll(1)
    starts_set = starts_sequence | (key_set != key_set.roll(1))
    if queries.over == "set":
        starts = starts_set
    else:  # also where no entry before it in the sequence reaches its keys
        reached = (key_end + sequence * (length + 1)).cummax(dim=0).values.roll(1)
        starts = starts_sequence | (starts_set & (key_start + sequence * (length + 1) >= reached))
    segments = batch * len(key_sets)
    blocks, read_blocks = (_blocks(entries, *_cut(cut, block_rows, segments), length) for cut in (starts, starts_set))
    sequences = _blocks(entries, sequence, batch, length)
    sequences = sequences._replace(sequence=torch.arange(batch, device=order.device))
    tables = tuple(_table(columns) for columns in (entries, sequences, blocks, read_blocks))
    return tables, queries.key_columns(length)


def _table(columns: tuple[Tensor, ...]) -> Tensor:
    """Return int32 [·, 8], filled up with zeros."""
    return torch.nn.functional.pad(torch.stack(list(columns), dim=1), (0, _WIDTH - len(columns))).int()


def num_blocks(num_rows: int, block_rows: int, segments: int) -> int:
    """Return the most blocks of at most `block_rows` rows, each within one of so many segments."""
    segments = min(num_rows, segments)
    return (num_rows + segments * (block_rows - 1)) // block_rows


def _cut(starts: Tensor, block_rows: int, segments: int) -> tuple[Tensor, int]:
    """Cut the entries where a segment starts, and then every `block_rows`.

    Returns:
        The block of each entry [R], and the number of blocks.
    """
    entry = torch.arange(len(starts), device=starts.device)
    starts = starts | (entry == 0)
    within = entry - torch.where(starts, entry, 0).cummax(dim=0).values
    block = (within % block_rows == 0).cumsum(dim=0) - 1
    return block, num_blocks(len(entry), block_rows, segments)


def _blocks(entries: Entries, block: Tensor, count: int, length: int) -> Blocks:
    """Return the blocks [count] of entries, each of which is in `block`."""
    entry = torch.arange(len(block), device=block.device)

    def least(values, nothing):
        return values.new_full((count,), nothing).scatter_reduce_(0, block, values, "amin")

    def largest(values):
        return values.new_zeros(count).scatter_reduce_(0, block, values, "amax")

    empty = entries.key_start >= entries.key_end
    return Blocks(
        sequence=largest(entries.sequence),
        first=least(entry, len(block)),
        end=largest(entry + 1),
        first_key=least(torch.where(empty, length, entries.key_start), length),
        end_key=largest(torch.where(empty, 0, entries.key_end)),
        key_set=largest(entries.key_set),
    )


def _same_token(sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each entry the next one on the same token, −1 if it is the last, and 1 if it is the first."""
    same = (sequence[:, None] == sequence) & (position[:, None] == position)  # [R, R]
    entry = torch.arange(len(sequence), device=sequence.device)
    later = torch.where(same & (entry > entry[:, None]), entry, len(entry)).amin(dim=1)
    earlier = (same & (entry < entry[:, None])).any(dim=1)
    return torch.where(later == len(entry), -1, later), (~earlier).long()
