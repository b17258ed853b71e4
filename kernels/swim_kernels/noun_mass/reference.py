"""Noun mass, eager: the specification. Plain operations, everything materialised, differentiated by autograd.

Of the probabilities p [R, Hq, L] of `attention_rows/reference.py`, for row r, head h and set s of its group

    m[r,h,s] = Σ_j p[r,h,j]     over the keys j in sets[key_set[r], s], each once

which is exp(lse_s − lse) with lse_s the logarithm of Σ exp s[r,h,j] over the keys in both the set and the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swim_kernels.attention_rows.reference import probabilities_eager
from swim_kernels.structs.key_columns import find_members
from swim_kernels.structs.noun_queries import NounQueries


def noun_mass_eager(
    query: Tensor, key: Tensor, queries: NounQueries, sets: Tensor, scale: float, lse: Tensor | None = None
) -> Tensor:
    """Return masses [R, Hq, S]; arguments as `noun_mass`, already checked.

    Computed and returned in float64 for float64 inputs, in float32 for all others. Takes memory for R × Hkv × L × D
    keys and several times R × Hq × L scores. A row without a key in its softmax gives zeros.
    """
    p = probabilities_eager(query, key, queries, scale, lse)
    members = find_members(sets, key.shape[2]).index_select(0, queries.key_set)  # [R, S, L]
    return torch.einsum("rhj,rsj->rhs", p, members.to(p.dtype))
