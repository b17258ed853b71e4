"""The rows in torch operations, on any device, with little memory: the keys are worked through in chunks.

    p[r,h,j]  = exp(s[r,h,j] − lse[r,h])
    ds[r,h,j] = scale · p[r,h,j] · (w[r,h,j] − δ[r,h])       w: what arrives at p, δ = Σ_j p · w
    ∂q[r,h]   = Σ_j ds[r,h,j] · k[h//g,j]         ∂k[j] = Σ_{r, h in group} ds[r,h,j] · q[r,h]

Deterministic: every element of ∂k is written once, chunk lengths depend on shapes only, and where several rows share a
token they are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swim_kernels.runtime.numerics import add_at
from swim_kernels.structs.noun_queries import NounQueries

# Scores computed at a time (Hq × rows × keys): about what a core's cache holds; a GPU wants fewer, longer launches.
_CHUNK_SCORES_CPU = 2**18
_CHUNK_SCORES_ACCELERATOR = 2**24


def rows_of_query(query: Tensor, queries: NounQueries) -> Tensor:
    """[R, Hq, D]"""
    return query[queries.sequence, :, queries.position]


@dataclass(frozen=True)
class Differences:
    """scale · (w − δ) of the rows of a group.

    Attributes:
        of_keys: returns those of the keys [first, end) as [Hq or 1, n, end − first].
        span: keys to which they matter.
        scores: s [Hq, n, keys of the group] if they are known; used up.
    """

    of_keys: Callable[[int, int], Tensor]
    span: tuple[int, int]
    scores: Tensor | None = None


@dataclass(frozen=True)
class RowGroup:
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


def group_rows(queries: NounQueries, batch: int, length: int, read: Tensor | None = None) -> list[RowGroup]:
    """Return the rows in groups; `read` [G, ·] are the keys that a row of each key set is read out on, −1: no key."""
    if not len(queries):
        return []
    if can_look(queries):
        return _group_by_range(queries, length, queries.key_sets if read is None else read)
    return _group_by_sequence(queries, batch, length)


def can_look(queries: NounQueries) -> bool:
    """Reading the metadata is free; elsewhere it would wait for the device."""
    return queries.device.type == "cpu"


def _group_by_sequence(queries: NounQueries, batch: int, length: int) -> list[RowGroup]:
    """One group per sequence, made without looking at the metadata.

    So which rows are its own is not known: a group has *all* rows, those of other sequences with an empty range.
    """
    everything, nothing = (0, length), (0, 0)
    members = queries.members(length) if queries.over == "set" else None
    groups = []
    for b in range(batch):
        start, end = (torch.where(queries.sequence == b, bound, 0) for bound in queries.reach())
        groups.append(RowGroup(b, None, start, end, everything, common=nothing, read=everything, members=members))
    return groups


def _group_by_range(queries: NounQueries, length: int, keys: Tensor) -> list[RowGroup]:
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

    key_set = queries.key_set.tolist()
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
            RowGroup(
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


def key_chunks(
    key: Tensor, rows: RowGroup, num_heads: int, span: tuple[int, int], dtype: torch.dtype
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


def _chunk_keys(key: Tensor, rows: RowGroup, num_heads: int) -> int:
    """Return the number of keys of a piece."""
    budget = _CHUNK_SCORES_CPU if key.device.type == "cpu" else _CHUNK_SCORES_ACCELERATOR
    return max(128, budget // (num_heads * len(rows.start)) // 128 * 128)


def only_scores(q: Tensor, key: Tensor, rows: RowGroup, num_heads: int, scale: float) -> Tensor | None:
    """Return s [Hq, n, C] of rows whose keys are one piece, as those of a patch often are, to be computed once."""
    first, end = rows.range
    if end - first > _chunk_keys(key, rows, num_heads):
        return None
    return compute_scores(q, key[rows.sequence, :, first:end].to(q.dtype), scale, len(rows.start))


def stack_heads(query_rows: Tensor, num_key_heads: int) -> Tensor:
    """[n, Hq, D] → [Hkv, g·n, D]: one matrix for every key head. Read as [Hq, n, D] it has one for every query head."""
    return query_rows.transpose(0, 1).reshape(num_key_heads, -1, query_rows.shape[-1])


def compute_scores(q: Tensor, k: Tensor, scale: float, num_rows: int) -> Tensor:
    """[Hkv, g·n, D], [Hkv, C, D] → s [Hq, n, C]. Scaled afterwards: a scaled query would be a rounded one."""
    return torch.bmm(q, k.transpose(1, 2)).mul_(scale).view(-1, num_rows, k.shape[1])


def probabilities(
    q: Tensor, k: Tensor, scale: float, lse: Tensor, outside: Tensor | None, scores: Tensor | None = None
) -> Tensor:
    """Return p [Hq, n, C] of queries [Hkv, g·n, D], keys [Hkv, C, D] and lse [Hq, n]; exactly 0 outside the rows'
    softmax. Scores that are there already are used up."""
    if scores is None:
        scores = compute_scores(q, k, scale, lse.shape[1])
    p = scores.sub_(lse[..., None]).exp_()
    return p if outside is None else p.masked_fill_(outside, 0.0)


def log_sum_exp(
    q: Tensor, key: Tensor, rows: RowGroup, num_heads: int, scale: float, scores: Tensor | None = None
) -> Tensor:
    """Return lse [Hq, n] over each row's range; 0 where there is no key."""
    num_rows = len(rows.start)
    lowest = torch.finfo(q.dtype).min
    maxima, sums = [], []  # of the chunks
    for _, _, k, outside in key_chunks(key, rows, num_heads, rows.range, q.dtype):
        s = compute_scores(q, k, scale, num_rows) if scores is None else scores.clone()
        if outside is not None:
            s.masked_fill_(outside, float("-inf"))
        maxima.append(s.amax(dim=-1).clamp_(min=lowest))  # not −inf: −inf − (−inf) is NaN
        sums.append(s.sub_(maxima[-1][..., None]).exp_().sum(dim=-1))
    maxima, sums = torch.stack(maxima), torch.stack(sums)  # [chunks, Hq, n]
    maximum = maxima.amax(dim=0)
    total = (sums * (maxima - maximum).exp()).sum(dim=0)
    return (maximum + total.log()).masked_fill_(total == 0, 0.0)


def add_gradients_of_rows(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    query_rows: Tensor,
    key: Tensor,
    queries: NounQueries,
    scale: float,
    lse: Tensor,
    differences: Callable[[RowGroup, Tensor, Tensor], Differences],
) -> None:
    """Add ∂q and ∂k to tensors like query and key, in place; None where it is not wanted.

    Args:
        query_rows: [R, Hq, D]
        lse: [R, Hq]
        differences: called with a group, its queries [Hkv, g·n, D] and its lse [Hq, n].
    """
    dtype = lse.dtype
    num_heads = query_rows.shape[1]
    grad_rows = None if grad_query is None else torch.zeros_like(query_rows, dtype=dtype)
    for rows in group_rows(queries, key.shape[0], key.shape[2]):
        q = stack_heads(rows.take(query_rows).to(dtype), key.shape[1])
        row_lse = rows.take(lse).t()
        found = differences(rows, q, row_lse)
        grad_q = None if grad_query is None else torch.zeros_like(q)
        for lo, hi, k, outside in key_chunks(key, rows, num_heads, found.span, dtype):
            ds = probabilities(q, k, scale, row_lse, outside, found.scores)  # [Hq, n, keys]
            ds = ds.mul_(found.of_keys(lo, hi)).view(len(k), -1, hi - lo)
            if grad_q is not None:  # ds is [Hkv, g·n, keys]
                grad_q.baddbmm_(ds, k)
            if grad_key is not None:
                grad_key[rows.sequence, :, lo:hi].add_(torch.bmm(ds.transpose(1, 2), q))
        if grad_q is not None:
            rows.put(grad_rows, grad_q.view(num_heads, -1, q.shape[-1]).transpose(0, 1))
    if grad_query is not None:
        _add_rows(grad_query, queries, grad_rows)


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
