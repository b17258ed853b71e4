"""Noun attention, eager: the specification. Plain operations, everything materialised, differentiated by autograd.

Of the probabilities p [R, Hq, L] of `attention_rows/reference.py`, for row r and column n of its key set

    a[r,h,n] = p[r,h,key_sets[key_set[r],n]]     0 where key_sets is −1; heads="each"
    a[r,n]   = (1/Hq) Σ_h a[r,h,n]               heads="mean"
"""

from __future__ import annotations

from torch import Tensor

from swim_kernels.attention_rows.reference import probabilities_eager
from swim_kernels.structs.noun_queries import NounQueries


def noun_attention_eager(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None, heads: str = "mean"
) -> Tensor:
    """Return attention maps [R, N] or [R, Hq, N]; arguments as `noun_attention`, already checked.

    Computed and returned in float64 for float64 inputs, in float32 for all others. Takes memory for R × Hkv × L × D
    keys and several times R × Hq × L scores. A row without a key in its softmax gives zeros.
    """
    p = probabilities_eager(query, key, queries, scale, lse)
    keys = queries.key_sets.index_select(0, queries.key_set).long()  # [R, N]
    if heads == "mean":
        return p.mean(dim=1).gather(1, keys.clamp(min=0)).masked_fill(keys < 0, 0.0)
    keys = keys[:, None].expand(-1, p.shape[1], -1)
    return p.gather(2, keys.clamp(min=0)).masked_fill(keys < 0, 0.0)
