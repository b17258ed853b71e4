"""The table of the sets for the Triton kernels, made once for all layers of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from swim_kernels.structs.key_columns import find_members

_WORD = 32  # sets in a word

_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def members_of(sets: Tensor, length: int) -> Tensor:
    """Return the table of sets [G, S, M]; made at the first call, then remembered.

    It is remembered for the tensor, as long as that lives, and made anew if it was written to; as the plan of the rows,
    one made while a CUDA graph is captured is part of the graph.
    """
    if torch.compiler.is_compiling():
        return make_members(sets, length)
    capturing = sets.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    which = (length, capturing, None if sets.is_inference() else sets._version)
    tables = _tables.setdefault(sets, {})
    if which not in tables:
        tables[which] = make_members(sets, length)
    return tables[which]


def make_members(sets: Tensor, length: int) -> Tensor:
    """Return in which sets each of `length` keys is: int32 [G, ⌈S / 32⌉, L], a bit for each set."""
    num_groups, num_sets, _ = sets.shape
    table = torch.zeros(num_groups, -(-num_sets // _WORD), length, dtype=torch.int32, device=sets.device)
    for index in range(num_sets):  # one at a time: all at once would be as large as L masks
        table[:, index // _WORD] |= find_members(sets[:, index], length).int() << index % _WORD
    return table
