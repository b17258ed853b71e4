"""The rows, eager: the specification. Plain operations, everything materialised, differentiated by autograd.

For row r (sequence b, position t), query head h, key j of the row's softmax, g = Hq / Hkv; the keys of the softmax are
[key_start, key_end), or with over="set" those of the row's key set, each once:

    s[r,h,j] = scale · q[b,h,t] · k[b,h//g,j]
    lse[r,h] = log Σ_j exp s[r,h,j]
    p[r,h,j] = exp(s[r,h,j] − lse[r,h])                     0 for all other keys
"""

from __future__ import annotations

import torch
from torch import Tensor

from swim_kernels.runtime.numerics import compute_dtype
from swim_kernels.structs.noun_queries import NounQueries


def probabilities_eager(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None
) -> Tensor:
    """Return p [R, Hq, L], in float64 for float64 inputs, in float32 for all others.

    A row without a key in its softmax gives zeros. With lse [R, Hq], a constant, the gradient is that of the full
    softmax all the same.
    """
    dtype = compute_dtype(query.dtype)
    num_heads, length = query.shape[1:3]
    num_key_heads = key.shape[1]

    # index_select and not query[sequence, :, position], whose gradient is summed in no fixed order on several threads.
    tokens = query.transpose(1, 2).flatten(0, 1)  # [B·L, Hq, D]
    q = tokens.index_select(0, queries.sequence.long() * length + queries.position).to(dtype)  # [R, Hq, D]
    q = q.unflatten(1, (num_key_heads, num_heads // num_key_heads))  # [R, Hkv, g, D]
    k = key.index_select(0, queries.sequence).to(dtype)  # [R, Hkv, L, D]

    if queries.over == "set":
        inside = queries.members(length)  # [R, L]
    else:
        positions = torch.arange(length, device=query.device)
        inside = (positions >= queries.key_start[:, None]) & (positions < queries.key_end[:, None])
    outside = ~inside[:, None]  # [R, 1, L]
    s = scale * torch.einsum("rkgd,rkjd->rkgj", q, k).flatten(1, 2)  # [R, Hq, L]
    s = s.masked_fill(outside, float("-inf"))

    if lse is None:
        lse = torch.logsumexp(s, dim=-1)  # [R, Hq]
    else:  # a constant, to which the gradient of logsumexp is given: ∂lse/∂s = p
        p = torch.exp(s - lse[..., None]).masked_fill(outside, 0.0).detach()
        lse = lse.detach() + (p * (s - s.detach()).masked_fill(outside, 0.0)).sum(dim=-1)
    return torch.exp(s - lse[..., None]).masked_fill(outside, 0.0)
