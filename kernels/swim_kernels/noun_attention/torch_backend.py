"""Noun attention in torch operations, on any device, with little memory: the probabilities are recomputed in backward.

The keys are worked through in chunks, several times: (1) lse, unless it is handed over, (2) maps, in backward
(3) δ, (4) ∂q and ∂k. Kept between forward and backward: the R query rows, the key tensor itself, lse, the metadata.

    p[r,h,j]  = exp(s[r,h,j] − lse[r,h])
    δ[r,h]    = Σ_j p[r,h,j] · w[r,j]             w[r,j] = (1/Hq) Σ_{n: the n-th key of the set is j} ∂a[r,n]
    ds[r,h,j] = scale · p[r,h,j] · (w[r,j] − δ[r,h])
    ∂q[r,h]   = Σ_j ds[r,h,j] · k[h//g,j]         ∂k[j] = Σ_{r, h in group} ds[r,h,j] · q[r,h]

Deterministic: every element of ∂k is written once, chunk lengths depend on shapes only, and where several rows or
columns add to one place they do so in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swim_kernels.runtime.numerics import add_at, compute_dtype, no_autocast
from swim_kernels.structs.noun_queries import NounQueries

# Scores computed at a time (Hq × rows × keys): about what a core's cache holds; a GPU wants fewer, longer launches.
_CHUNK_SCORES_CPU = 2**18
_CHUNK_SCORES_ACCELERATOR = 2**24


def noun_attention_torch(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None
) -> Tensor:
    """Head-averaged attention maps [R, N]; arguments as `noun_attention`, already checked.

    Computed and returned in float64 for float64 inputs, in float32 for all others. No double backward. A row without a
    key in its softmax gives zeros.
    """
    return _NounAttention.apply(query, key, queries, scale, lse)


class _NounAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, queries, scale, lse):
        ctx.set_materialize_grads(False)
        query_rows = _query_rows(query, queries)
        maps, lse = _forward(query_rows, key, queries, scale, lse)
        ctx.scale, ctx.queries = scale, queries
        ctx.query_like = torch.empty_like(query, device="meta")  # shape, strides and dtype of ∂q, but no memory
        ctx.save_for_backward(query_rows, key, lse, *queries.tensors())
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_maps):
        if grad_maps is None:
            return None, None, None, None, None
        query_rows, key, lse, *_ = ctx.saved_tensors  # those of the queries too, so that a change to them is noticed
        want_query, want_key = ctx.needs_input_grad[:2]
        grad_query = torch.zeros_like(ctx.query_like, device=key.device) if want_query else None
        grad_key = torch.zeros_like(key) if want_key else None
        with no_autocast(key.device.type):
            _add_gradients(grad_query, grad_key, grad_maps, query_rows, key, ctx.queries, ctx.scale, lse)
        return grad_query, grad_key, None, None, None


def maps_and_lse(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return maps [R, N] and lse [R, Hq], which is computed unless it is handed over, without a graph."""
    return _forward(_query_rows(query, queries), key, queries, scale, lse)


def deltas(
    grad_maps: Tensor, query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return δ [R, Hq] of the gradient of the maps [R, N], and what `add_gradients` takes as weights."""
    delta = torch.zeros_like(lse)
    query_rows = _query_rows(query, queries)
    for rows in _group_rows(queries, key.shape[0], key.shape[2]):
        q = _stack_heads(rows.take(query_rows).to(lse.dtype), key.shape[1])
        w = _weights(grad_maps, query.shape[1], queries, rows, lse.dtype)
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
    query_rows = _query_rows(query, queries)
    _add_gradients(grad_query, grad_key, grad_maps, query_rows, key, queries, scale, lse, weights)


def _forward(query_rows, key, queries, scale, lse):
    """Maps [R, N] and lse [R, Hq], both in the dtype of the computation."""
    dtype = compute_dtype(key.dtype)
    num_rows, num_heads, _ = query_rows.shape
    given = lse is not None
    lse = lse.detach() if given else query_rows.new_zeros(num_rows, num_heads, dtype=dtype)
    maps = query_rows.new_zeros(num_rows, queries.key_sets.shape[1], dtype=dtype)
    for rows in _group_rows(queries, key.shape[0], key.shape[2]):
        q = _stack_heads(rows.take(query_rows).to(dtype), key.shape[1])
        scores = _only_scores(q, key, rows, num_heads, scale)
        if not given:
            rows.put(lse, _log_sum_exp(q, key, rows, num_heads, scale, scores).t())
        row_lse = rows.take(lse).t()
        first, end = rows.range
        means = maps.new_zeros(len(rows.start), end - first)  # head mean of p, per key of the range
        for lo, hi, k, outside in _key_chunks(key, rows, num_heads, rows.read, dtype):
            p = _probabilities(q, k, scale, row_lse, outside, scores)
            torch.mean(p, dim=0, out=means[:, lo - first : hi - first])
        columns, absent = _columns(queries, rows)
        rows.put(maps, means.gather(1, columns).masked_fill_(absent, 0.0))
    return maps, lse


def _add_gradients(grad_query, grad_key, grad_maps, query_rows, key, queries, scale, lse, weights=None):
    """As `add_gradients`, for query rows [R, Hq, D]."""
    dtype = lse.dtype
    num_heads = query_rows.shape[1]
    if not grad_maps.numel():
        return
    grad_rows = None if grad_query is None else torch.zeros_like(query_rows, dtype=dtype)
    with_delta = weights is None
    for rows in _group_rows(queries, key.shape[0], key.shape[2]):
        q = _stack_heads(rows.take(query_rows).to(dtype), key.shape[1])
        row_lse = rows.take(lse).t()
        w = _weights(grad_maps, num_heads, queries, rows, dtype).mul_(scale)  # so that ds is scaled
        scores = _only_scores(q, key, rows, num_heads, scale)
        delta = torch.zeros_like(row_lse)  # [Hq, rows]
        if with_delta:
            delta = _deltas(q, key, rows, row_lse, w, scale, None if scores is None else scores.clone())
        grad_q = None if grad_query is None else torch.zeros_like(q)
        first = rows.range[0]
        for lo, hi, k, outside in _key_chunks(key, rows, num_heads, rows.range if with_delta else rows.read, dtype):
            ds = _probabilities(q, k, scale, row_lse, outside, scores)  # [Hq, rows, keys]
            ds = ds.mul_(w[:, lo - first : hi - first] - delta[..., None]).view(len(k), -1, hi - lo)
            if grad_q is not None:  # ds is [Hkv, g·rows, keys]
                grad_q.baddbmm_(ds, k)
            if grad_key is not None:
                grad_key[rows.sequence, :, lo:hi].add_(torch.bmm(ds.transpose(1, 2), q))
        if grad_q is not None:
            rows.put(grad_rows, grad_q.view(num_heads, -1, q.shape[-1]).transpose(0, 1))
    if grad_query is not None:
        _add_rows(grad_query, queries, grad_rows)


def _deltas(q, key, rows, row_lse, w, scale, scores=None):
    """Σ_j p · w [Hq, n] of the rows of a group, over the keys that are read out."""
    delta, first = torch.zeros_like(row_lse), rows.range[0]
    for lo, hi, k, outside in _key_chunks(key, rows, len(row_lse), rows.read, q.dtype):
        p = _probabilities(q, k, scale, row_lse, outside, scores)
        delta += p.mul_(w[:, lo - first : hi - first]).sum(dim=-1)
    return delta


def _query_rows(query: Tensor, queries: NounQueries) -> Tensor:
    """[R, Hq, D]"""
    return query[queries.sequence, :, queries.position]


@dataclass(frozen=True)
class _RowGroup:
    """Rows of one sequence that are computed together, n of them."""

    sequence: int
    index: Tensor | None  # [n] which rows; None: all
    start: Tensor  # [n] reach of the softmax
    end: Tensor  # [n]
    range: tuple[int, int]  # keys in the reach of any of the rows
    common: tuple[int, int]  # keys in the reach of every row: need no mask
    read: tuple[int, int]  # keys that are read out
    members: Tensor | None = None  # [n, L] keys of the softmax, where that is over a key set with gaps

    def take(self, tensor: Tensor) -> Tensor:
        """Return the part [n, …] of these rows of a tensor [R, …]."""
        return tensor if self.index is None else tensor.index_select(0, self.index)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Store the values [n, …] of these rows in a tensor [R, …] of zeros."""
        if self.index is None:
            tensor.add_(values)  # a row of another sequence adds 0
        else:
            tensor.index_copy_(0, self.index, values)


def _group_rows(queries: NounQueries, batch: int, length: int) -> list[_RowGroup]:
    if not len(queries):
        return []
    if _can_look(queries):
        return _group_by_range(queries, length)
    return _group_by_sequence(queries, batch, length)


def _can_look(queries: NounQueries) -> bool:
    """Reading the metadata is free; elsewhere it would wait for the device."""
    return queries.device.type == "cpu"


def _group_by_sequence(queries: NounQueries, batch: int, length: int) -> list[_RowGroup]:
    """One group per sequence, made without looking at the metadata.

    So which rows are its own is not known: a group has *all* rows, those of other sequences with an empty range.
    """
    everything, nothing = (0, length), (0, 0)
    members = queries.members(length) if queries.over == "set" else None
    groups = []
    for b in range(batch):
        start, end = (torch.where(queries.sequence == b, bound, 0) for bound in queries.reach())
        groups.append(_RowGroup(b, None, start, end, everything, common=nothing, read=everything, members=members))
    return groups


def _group_by_range(queries: NounQueries, length: int) -> list[_RowGroup]:
    """Rows of one sequence whose softmax ranges, or spans of key sets, overlap are a group: nothing is computed in
    vain."""
    starts, ends = queries.reach()
    sequence, start, end = queries.sequence.tolist(), starts.tolist(), ends.tolist()
    found: list[list[int]] = []
    last = (-1, 0)  # sequence and end of the latest group
    for row in sorted(range(len(queries)), key=lambda row: (sequence[row], start[row])):
        if start[row] >= end[row]:
            continue
        if sequence[row] == last[0] and start[row] < last[1]:
            found[-1].append(row)
            last = (last[0], max(last[1], end[row]))
        else:
            found.append([row])
            last = (sequence[row], end[row])

    key_set, keys = queries.key_set.tolist(), queries.key_sets
    set_start = set_end = [0] * len(keys)
    if keys.numel():
        set_start = keys.masked_fill(keys < 0, length).amin(dim=1).tolist()
        set_end = (keys.amax(dim=1) + 1).tolist()
    members = queries.members(length) if queries.over == "set" and queries.has_gaps else None

    groups = []
    for rows in found:
        index = None if len(rows) == len(queries) else torch.tensor(rows)
        lo, hi = min(start[row] for row in rows), max(end[row] for row in rows)
        groups.append(
            _RowGroup(
                sequence[rows[0]],
                index,
                starts if index is None else starts[index],
                ends if index is None else ends[index],
                range=(lo, hi),
                common=(max(start[row] for row in rows), min(end[row] for row in rows)),
                read=(
                    max(lo, min(set_start[key_set[row]] for row in rows)),
                    min(hi, max(set_end[key_set[row]] for row in rows)),
                ),
                members=members if members is None or index is None else members[index],
            )
        )
    return groups


def _key_chunks(
    key: Tensor, rows: _RowGroup, num_heads: int, span: tuple[int, int], dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """The rows' keys piece by piece, as far as they meet `span`: first, end, keys [Hkv, C, D], and [n, C] True outside
    the rows' softmax, or None.

    The pieces are the same for every span, so that every pass sees the same bits of a score: if lse and p came from
    differently rounded scores, p would not sum to one and ds = p·(w − δ) would be off where p is near one.
    """
    step = _chunk_keys(key, rows, num_heads)
    for lo in range(rows.range[0], rows.range[1], step):
        hi = min(lo + step, rows.range[1])
        if hi <= span[0] or lo >= span[1]:
            continue
        outside = None
        if lo < rows.common[0] or hi > rows.common[1]:
            positions = torch.arange(lo, hi, device=key.device)
            outside = (positions < rows.start[:, None]) | (positions >= rows.end[:, None])
        if rows.members is not None:
            absent = ~rows.members[:, lo:hi]
            outside = absent if outside is None else outside | absent
        yield lo, hi, key[rows.sequence, :, lo:hi].to(dtype), outside


def _chunk_keys(key: Tensor, rows: _RowGroup, num_heads: int) -> int:
    """Return the number of keys of a piece."""
    budget = _CHUNK_SCORES_CPU if key.device.type == "cpu" else _CHUNK_SCORES_ACCELERATOR
    return max(128, budget // (num_heads * len(rows.start)) // 128 * 128)


def _only_scores(q: Tensor, key: Tensor, rows: _RowGroup, num_heads: int, scale: float) -> Tensor | None:
    """Return s [Hq, n, C] of rows whose keys are one piece, as those of a patch often are, to be computed once."""
    first, end = rows.range
    if end - first > _chunk_keys(key, rows, num_heads):
        return None
    return _scores(q, key[rows.sequence, :, first:end].to(q.dtype), scale, len(rows.start))


def _stack_heads(query_rows: Tensor, num_key_heads: int) -> Tensor:
    """[n, Hq, D] → [Hkv, g·n, D]: one matrix for every key head. Read as [Hq, n, D] it has one for every query head."""
    return query_rows.transpose(0, 1).reshape(num_key_heads, -1, query_rows.shape[-1])


def _scores(q: Tensor, k: Tensor, scale: float, num_rows: int) -> Tensor:
    """[Hkv, g·n, D], [Hkv, C, D] → s [Hq, n, C]. Scaled afterwards: a scaled query would be a rounded one."""
    return torch.bmm(q, k.transpose(1, 2)).mul_(scale).view(-1, num_rows, k.shape[1])


def _probabilities(
    q: Tensor, k: Tensor, scale: float, lse: Tensor, outside: Tensor | None, scores: Tensor | None = None
) -> Tensor:
    """Return p [Hq, n, C] of queries [Hkv, g·n, D], keys [Hkv, C, D] and lse [Hq, n]; exactly 0 outside the rows'
    softmax. Scores that are there already are used up."""
    if scores is None:
        scores = _scores(q, k, scale, lse.shape[1])
    p = scores.sub_(lse[..., None]).exp_()
    return p if outside is None else p.masked_fill_(outside, 0.0)


def _log_sum_exp(
    q: Tensor, key: Tensor, rows: _RowGroup, num_heads: int, scale: float, scores: Tensor | None = None
) -> Tensor:
    """Return lse [Hq, n] over each row's range; 0 where there is no key."""
    num_rows = len(rows.start)
    lowest = torch.finfo(q.dtype).min
    maxima, sums = [], []  # of the chunks
    for _, _, k, outside in _key_chunks(key, rows, num_heads, rows.range, q.dtype):
        s = _scores(q, k, scale, num_rows) if scores is None else scores.clone()
        if outside is not None:
            s.masked_fill_(outside, float("-inf"))
        maxima.append(s.amax(dim=-1).clamp_(min=lowest))  # not −inf: −inf − (−inf) is NaN
        sums.append(s.sub_(maxima[-1][..., None]).exp_().sum(dim=-1))
    maxima, sums = torch.stack(maxima), torch.stack(sums)  # [chunks, Hq, n]
    maximum = maxima.amax(dim=0)
    total = (sums * (maxima - maximum).exp()).sum(dim=0)
    return (maximum + total.log()).masked_fill_(total == 0, 0.0)


def _columns(queries: NounQueries, rows: _RowGroup) -> tuple[Tensor, Tensor]:
    """Return of the rows' columns [n, N] the key within the group's range, int64, and True where there is none.

    Such a column points somewhere, but not everywhere in the same place: equal indices are added one after the other.
    """
    keys = queries.key_sets.index_select(0, rows.take(queries.key_set)).long()
    first, end = rows.range
    absent = (keys < first) | (keys >= end)
    somewhere = torch.arange(keys.shape[1], device=keys.device) % (end - first)
    return torch.where(absent, somewhere, keys - first), absent


def _weights(grad_maps: Tensor, num_heads: int, queries: NounQueries, rows: _RowGroup, dtype: torch.dtype) -> Tensor:
    """w [n, keys of the group's range]: Σ ∂a / Hq over the columns that name the key."""
    columns, absent = _columns(queries, rows)
    values = (rows.take(grad_maps).to(dtype) / num_heads).masked_fill_(absent, 0.0)
    weights = values.new_zeros(len(columns), rows.range[1] - rows.range[0])
    places = columns + weights.shape[1] * torch.arange(len(columns), device=columns.device)[:, None]
    add_at(weights.view(-1), places.flatten(), values.flatten())
    return weights


def _add_rows(grad_query: Tensor, queries: NounQueries, grad_rows: Tensor) -> None:
    """Add ∂ of the rows [R, Hq, D] to their tokens in ∂q [B, Hq, L, D]; rows of one token are summed first."""
    if not len(queries):
        return
    sequence, position = queries.sequence, queries.position
    same = (sequence[:, None] == sequence) & (position[:, None] == position)  # [R, R]
    order = torch.arange(len(queries), device=queries.device)
    first = torch.where(same, order, len(queries)).amin(dim=1)  # [R] the first row of the same token
    total = torch.zeros_like(grad_rows)
    add_at(total, first, grad_rows)
    # Rows of one token write the same bits, in whatever order.
    total = grad_query[sequence, :, position] + total.index_select(0, first)
    grad_query[sequence, :, position] = total.to(grad_query.dtype)
