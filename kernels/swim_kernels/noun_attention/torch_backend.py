"""Noun attention in torch operations, on any device, with little memory: the probabilities are recomputed in backward.

The keys are worked through in chunks, several times: (1) lse, unless it is handed over, (2) maps, in backward
(3) δ, (4) ∂q and ∂k. Kept between forward and backward: the R query rows, the key tensor itself, lse, the metadata.

    δ[r,h] = Σ_j p[r,h,j] · w[r,j]       w[r,j] = (1/Hq) Σ_{n: the n-th key of the set is j} ∂a[r,n]

∂q and ∂k follow as in `attention_rows/row_groups.py`. Deterministic as what is there; several columns add to one key in
a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swim_kernels.attention_rows.row_groups import (
    Differences,
    RowGroup,
    add_gradients_of_rows,
    group_rows,
    key_chunks,
    log_sum_exp,
    only_scores,
    probabilities,
    rows_of_query,
    stack_heads,
)
from swim_kernels.runtime.numerics import add_at, compute_dtype, no_autocast
from swim_kernels.structs.noun_queries import NounQueries


def noun_attention_torch(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None, heads: str = "mean"
) -> Tensor:
    """Return attention maps [R, N] or [R, Hq, N]; arguments as `noun_attention`, already checked.

    Computed and returned in float64 for float64 inputs, in float32 for all others. No double backward. A row without a
    key in its softmax gives zeros.
    """
    return _NounAttention.apply(query, key, queries, scale, lse, heads)


class _NounAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, queries, scale, lse, heads):
        ctx.set_materialize_grads(False)
        query_rows = rows_of_query(query, queries)
        maps, lse = _forward(query_rows, key, queries, scale, lse, heads)
        ctx.scale, ctx.queries = scale, queries
        ctx.query_like = torch.empty_like(query, device="meta")  # shape, strides and dtype of ∂q, but no memory
        ctx.save_for_backward(query_rows, key, lse, *queries.tensors())
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_maps):
        if grad_maps is None:
            return None, None, None, None, None, None
        query_rows, key, lse, *_ = ctx.saved_tensors  # those of the queries too, so that a change to them is noticed
        want_query, want_key = ctx.needs_input_grad[:2]
        grad_query = torch.zeros_like(ctx.query_like, device=key.device) if want_query else None
        grad_key = torch.zeros_like(key) if want_key else None
        with no_autocast(key.device.type):
            _add_gradients(grad_query, grad_key, grad_maps, query_rows, key, ctx.queries, ctx.scale, lse)
        return grad_query, grad_key, None, None, None, None


def maps_and_lse(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None, heads: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Return maps [R, N] or [R, Hq, N] and lse [R, Hq], which is computed unless it is handed over, without a graph."""
    return _forward(rows_of_query(query, queries), key, queries, scale, lse, heads)


def deltas(
    grad_maps: Tensor, query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return δ [R, Hq] of the gradient of the maps, and what `add_gradients` takes as weights."""
    delta = torch.zeros_like(lse)
    query_rows = rows_of_query(query, queries)
    for rows in group_rows(queries, key.shape[0], key.shape[2]):
        q = stack_heads(rows.take(query_rows).to(lse.dtype), key.shape[1])
        w = _Weights(grad_maps, query.shape[1], queries, rows, lse.dtype)
        rows.put(delta, _deltas(q, key, rows, rows.take(lse).t(), w, scale).t())
    return delta, grad_maps


def add_gradients(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_maps: Tensor,
    query: Tensor,
    key: Tensor,
    queries: NounQueries,
    scale: float,
    lse: Tensor,
    weights: Tensor | None = None,
) -> None:
    """Add ∂q and ∂k of the maps to tensors like query and key, in place; None where it is not wanted.

    With the weights that `deltas` returned only the part p · w of ds = p · (w − δ) is added, for an attention that has
    been given δ as the gradient of its lse. It concerns only keys that are read out.
    """
    query_rows = rows_of_query(query, queries)
    _add_gradients(grad_query, grad_key, grad_maps, query_rows, key, queries, scale, lse, weights)


def _forward(query_rows, key, queries, scale, lse, heads):
    """Maps [R, N] or [R, Hq, N], and lse [R, Hq], both in the dtype of the computation."""
    dtype = compute_dtype(key.dtype)
    num_rows, num_heads, _ = query_rows.shape
    given = lse is not None
    lse = lse.detach() if given else query_rows.new_zeros(num_rows, num_heads, dtype=dtype)
    num_maps = 1 if heads == "mean" else num_heads  # of a row
    maps = query_rows.new_zeros(num_rows, num_maps, queries.key_sets.shape[1], dtype=dtype)
    for rows in group_rows(queries, key.shape[0], key.shape[2]):
        q = stack_heads(rows.take(query_rows).to(dtype), key.shape[1])
        scores = only_scores(q, key, rows, num_heads, scale)
        if not given:
            rows.put(lse, log_sum_exp(q, key, rows, num_heads, scale, scores).t())
        row_lse = rows.take(lse).t()
        first, end = rows.read
        if first >= end:
            continue
        values = maps.new_zeros(num_maps, len(rows.start), end - first)  # of the keys that are read out
        for lo, hi, k, outside in key_chunks(key, rows, num_heads, rows.read, dtype):
            p = probabilities(q, k, scale, row_lse, outside, scores)
            start, stop = max(lo, first), min(hi, end)
            p, target = p[..., start - lo : stop - lo], values[..., start - first : stop - first]
            if heads == "mean":
                torch.mean(p, dim=0, keepdim=True, out=target)
            else:
                target.copy_(p)
        columns, absent = _columns(queries, rows)
        values = values.gather(2, columns.expand(num_maps, -1, -1)).masked_fill_(absent, 0.0)
        rows.put(maps, values.transpose(0, 1))
    return maps.squeeze(1) if heads == "mean" else maps, lse


def _add_gradients(grad_query, grad_key, grad_maps, query_rows, key, queries, scale, lse, weights=None):
    """As `add_gradients`, for query rows [R, Hq, D]."""
    num_heads = query_rows.shape[1]
    if not grad_maps.numel():
        return

    def differences(rows: RowGroup, q: Tensor, row_lse: Tensor) -> Differences:
        w = _Weights(grad_maps, num_heads, queries, rows, lse.dtype, scale)  # so that ds is scaled
        known = only_scores(q, key, rows, num_heads, scale)
        delta = torch.zeros_like(row_lse)  # [Hq, n]
        if weights is None:
            delta = _deltas(q, key, rows, row_lse, w, scale, None if known is None else known.clone())

        def of_keys(lo: int, hi: int) -> Tensor:
            return w.of_keys(lo, hi) - delta[..., None]

        return Differences(of_keys, rows.range if weights is None else rows.read, known)

    add_gradients_of_rows(grad_query, grad_key, query_rows, key, queries, scale, lse, differences)


def _deltas(q, key, rows, row_lse, w, scale, scores=None):
    """Σ_j p · w [Hq, n] of the rows of a group, over the keys that are read out."""
    delta = torch.zeros_like(row_lse)
    for lo, hi, k, outside in key_chunks(key, rows, len(row_lse), rows.read, q.dtype):
        p = probabilities(q, k, scale, row_lse, outside, scores)
        delta += p.mul_(w.of_keys(lo, hi)).sum(dim=-1)
    return delta


def _columns(queries: NounQueries, rows: RowGroup) -> tuple[Tensor, Tensor]:
    """Return of the rows' columns [n, N] the key within the span that is read out, and True where there is none.

    Such a column points somewhere, but not everywhere in the same place: equal indices are added one after the other.
    """
    keys = queries.key_sets.index_select(0, rows.take(queries.key_set)).long()
    first, end = rows.read
    absent = (keys < first) | (keys >= end)
    somewhere = torch.arange(keys.shape[1], device=keys.device) % (end - first)
    return torch.where(absent, somewhere, keys - first), absent


class _Weights:
    """factor · w [1 or Hq, n, keys] of the rows of a group: Σ ∂a, or for the mean ∂a / Hq, over the columns of a key.

    Args:
        grad_maps: [R, N], or [R, Hq, N] if each head has a map.
    """

    def __init__(
        self,
        grad_maps: Tensor,
        num_heads: int,
        queries: NounQueries,
        rows: RowGroup,
        dtype: torch.dtype,
        factor: float = 1.0,
    ) -> None:
        self.first, self.end = rows.read
        values = rows.take(grad_maps).to(dtype)
        values = (values / num_heads)[:, None] if values.ndim == 2 else values
        num_rows, num_maps, _ = values.shape
        self.values = values.new_zeros(num_maps, num_rows, max(0, self.end - self.first))
        if self.first < self.end:
            columns, absent = _columns(queries, rows)
            values = values.transpose(0, 1).masked_fill(absent, 0.0)
            series = torch.arange(num_maps * num_rows, device=columns.device).view(num_maps, num_rows, 1)
            places = columns + self.values.shape[2] * series
            add_at(self.values.view(-1), places.flatten(), values.flatten())
            self.values.mul_(factor)

    def of_keys(self, first: int, end: int) -> Tensor:
        """Return those of keys [first, end), 0 for what is not read out."""
        start, stop = max(first, self.first), min(end, self.end)
        if start >= stop:
            return self.values.new_zeros(*self.values.shape[:2], 1)
        inner = self.values[..., start - self.first : stop - self.first]
        outer = (start - first, end - stop)
        return torch.nn.functional.pad(inner, outer) if any(outer) else inner
