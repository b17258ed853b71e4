"""Noun mass in torch operations, on any device, with little memory: the probabilities are recomputed in backward.

The keys are worked through in chunks, once in forward, which finds lse on the way, and once in backward. Kept between
them: the R query rows, the key tensor itself, lse, the masses, the metadata.

    m[r,h,s]  = Σ_{j in set s} exp(s[r,h,j] − lse[r,h])
    δ[r,h]    = Σ_s m[r,h,s] · ∂m[r,h,s]
    w[r,h,j]  = Σ_{s: j in set s} ∂m[r,h,s]

∂q and ∂k follow as in `attention_rows/row_groups.py`. The sums over sets are products with a matrix of zeros and ones,
in which a last row of ones stands for all keys: it gives lse in forward and takes −δ in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swim_kernels.attention_rows import row_groups
from swim_kernels.attention_rows.row_groups import Differences, RowGroup
from swim_kernels.runtime.numerics import compute_dtype, no_autocast
from swim_kernels.structs.key_columns import find_members
from swim_kernels.structs.noun_queries import NounQueries


def noun_mass_torch(
    query: Tensor, key: Tensor, queries: NounQueries, sets: Tensor, scale: float, lse: Tensor | None = None
) -> Tensor:
    """Return masses [R, Hq, S]; arguments as `noun_mass`, already checked.

    Computed and returned in float64 for float64 inputs, in float32 for all others. No double backward. A row without a
    key in its softmax gives zeros.
    """
    return _NounMass.apply(query, key, queries, sets, scale, lse)


class _NounMass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, queries, sets, scale, lse):
        ctx.set_materialize_grads(False)
        query_rows = row_groups.rows_of_query(query, queries)
        masses, lse = _masses_and_lse(query_rows, key, queries, sets, scale, lse)
        ctx.scale, ctx.queries = scale, queries
        ctx.query_like = torch.empty_like(query, device="meta")  # shape, strides and dtype of ∂q, but no memory
        ctx.save_for_backward(query_rows, key, lse, masses, sets, *queries.tensors())
        return masses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_masses):
        nothing = (None,) * 4
        if grad_masses is None:
            return None, None, *nothing
        query_rows, key, lse, masses, sets, *_ = ctx.saved_tensors  # those of the queries too: a change is noticed
        want_query, want_key = ctx.needs_input_grad[:2]
        grad_query = torch.zeros_like(ctx.query_like, device=key.device) if want_query else None
        grad_key = torch.zeros_like(key) if want_key else None
        with no_autocast(key.device.type):
            arguments = (query_rows, key, ctx.queries, sets, ctx.scale, lse)
            _add_gradients(grad_query, grad_key, grad_masses, masses, *arguments)
        return grad_query, grad_key, *nothing


def _masses_and_lse(query_rows, key, queries, sets, scale, lse):
    """Return masses [R, Hq, S] and lse [R, Hq], both in the dtype of the computation."""
    dtype = compute_dtype(key.dtype)
    num_rows, num_heads, _ = query_rows.shape
    given = lse is not None
    lse = lse.detach() if given else query_rows.new_zeros(num_rows, num_heads, dtype=dtype)
    masses = query_rows.new_zeros(num_rows, num_heads, sets.shape[1], dtype=dtype)
    table = find_members(sets, key.shape[2])
    for rows in row_groups.group_rows(queries, key.shape[0], key.shape[2], sets.flatten(1)):
        q = row_groups.stack_heads(rows.take(query_rows).to(dtype), key.shape[1])
        members = _Members(table, queries, rows, dtype)
        if given:
            row_masses = _masses(q, key, rows, members, rows.take(lse).t(), scale)
        else:
            row_masses, row_lse = _masses_with_lse(q, key, rows, members, num_heads, scale)
            rows.put(lse, row_lse)
        rows.put(masses, row_masses)
    return masses, lse


def _masses(q, key, rows, members, lse, scale):
    """Return masses [n, Hq, S] from lse [Hq, n]; only keys of the sets are read."""
    total = q.new_zeros(len(rows.start), len(lse), members.count)
    for lo, hi, k, outside in row_groups.key_chunks(key, rows, len(lse), rows.read, q.dtype):
        total += members.sum(row_groups.probabilities(q, k, scale, lse, outside), lo, hi)[..., :-1]
    return total


def _masses_with_lse(q, key, rows, members, num_heads, scale):
    """Return masses [n, Hq, S] and lse [n, Hq], 0 for a row without a key."""
    maximum, total = None, 0.0  # [n, Hq], and [n, Hq, S + 1] the sums of exp(s − maximum), that of all keys last
    for lo, hi, k, outside in row_groups.key_chunks(key, rows, num_heads, rows.range, q.dtype):
        s = row_groups.compute_scores(q, k, scale, len(rows.start))
        if outside is not None:
            s.masked_fill_(outside, float("-inf"))
        largest = s.amax(dim=-1).clamp_(min=torch.finfo(q.dtype).min)  # not −inf: −inf − (−inf) is NaN
        if maximum is not None:
            largest = torch.maximum(maximum, largest)
            total = total * (maximum - largest).exp_().t()[..., None]
        total = total + members.sum(s.sub_(largest[..., None]).exp_(), lo, hi)
        maximum = largest
    sums = total[..., -1]
    is_empty = sums == 0
    masses = (total[..., :-1] / sums[..., None]).masked_fill_(is_empty[..., None], 0.0)
    return masses, (maximum.t() + sums.log()).masked_fill_(is_empty, 0.0)


def _add_gradients(grad_query, grad_key, grad_masses, masses, query_rows, key, queries, sets, scale, lse):
    """Add ∂q and ∂k to tensors like query and key, in place; None where it is not wanted."""
    if not grad_masses.numel():
        return
    grad_masses = grad_masses.to(lse.dtype)
    delta = (masses * grad_masses).sum(dim=-1, keepdim=True)
    coefficients = torch.cat([grad_masses, -delta], dim=-1).mul_(scale)  # [R, Hq, S + 1]
    table = find_members(sets, key.shape[2])

    def differences(rows: RowGroup, q: Tensor, row_lse: Tensor) -> Differences:
        members, own = _Members(table, queries, rows, lse.dtype), rows.take(coefficients)
        return Differences(lambda lo, hi: members.spread(own, lo, hi), rows.range)

    row_groups.add_gradients_of_rows(grad_query, grad_key, query_rows, key, queries, scale, lse, differences)


class _Members:
    """Membership of keys in the sets of a group's rows, and in a last set of all keys.

    Args:
        table: bool [G, S, L]
    """

    def __init__(self, table: Tensor, queries: NounQueries, rows: RowGroup, dtype: torch.dtype) -> None:
        self.table, self.key_set, self.dtype = table, rows.take(queries.key_set), dtype
        if row_groups.can_look(queries) and len(self.key_set.unique()) == 1:
            self.key_set = self.key_set[:1]  # the same sets for all of them

    @property
    def count(self) -> int:
        """S, the number of sets."""
        return self.table.shape[1]

    def sum(self, values: Tensor, first: int, end: int) -> Tensor:
        """Return the sums over the sets [n, Hq, S + 1] of values [Hq, n, end − first] of keys."""
        matrix = self._matrix(first, end).transpose(1, 2)
        if len(matrix) == 1:
            return (values @ matrix[0]).transpose(0, 1)
        return values.transpose(0, 1) @ matrix

    def spread(self, values: Tensor, first: int, end: int) -> Tensor:
        """Return of each key the sum [Hq, n, end − first] of the values [n, Hq, S + 1] of the sets that it is in."""
        matrix = self._matrix(first, end)
        if len(matrix) == 1:
            return values.transpose(0, 1) @ matrix[0]
        return (values @ matrix).transpose(0, 1)

    def _matrix(self, first: int, end: int) -> Tensor:
        """Return ones and zeros [n or 1, S + 1, end − first]."""
        inside = self.table[:, :, first:end].index_select(0, self.key_set)
        return torch.nn.functional.pad(inside.to(self.dtype), (0, 0, 0, 1), value=1.0)
