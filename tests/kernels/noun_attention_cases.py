"""Inputs on which noun attention is tested, and what the formulas say about them."""

from __future__ import annotations

import importlib
import math

import torch

from swim_kernels import NounQueries, noun_attention
from tests.kernels.device import triton_on_device

# `swim_kernels.noun_attention` is the function, so its submodules cannot be imported by `import … as`.
torch_backend = importlib.import_module("swim_kernels.noun_attention.torch_backend")
reference = importlib.import_module("swim_kernels.noun_attention.reference")

BACKENDS = ("eager", "torch")


def make_queries(rows, key_sets, dtype=torch.int64, over="range"):
    """rows: (sequence, position, key_start, key_end, key_set); key_sets: lists, padded here."""
    columns = torch.tensor(rows, dtype=dtype).reshape(-1, 5).unbind(1)
    width = max((len(keys) for keys in key_sets), default=0)
    padded = [[*keys, *[-1] * (width - len(keys))] for keys in key_sets]
    return NounQueries(*columns, torch.tensor(padded, dtype=dtype).reshape(len(key_sets), width), over)


def over_sets(rows, key_sets, dtype=torch.int64):
    """rows: (sequence, position, key_set), each with a softmax over its key set."""
    return make_queries([(b, t, 0, 0, g) for b, t, g in rows], key_sets, dtype, over="set")


# name: (batch, query heads, key heads, length, head_dim, queries)
CASES = {
    "plain": (1, 4, 4, 37, 8, make_queries([(0, t, 0, t + 1, 0) for t in (36, 20, 29)], [range(3, 17)])),
    "group of 7": (1, 28, 4, 41, 16, make_queries([(0, t, 0, t + 1, 0) for t in (33, 40)], [range(1, 30)])),
    "group of 5, int32": (
        2,
        10,
        2,
        23,
        12,
        make_queries([(1, 22, 0, 23, 0), (0, 15, 0, 16, 1)], [[2, 3, 5], [0, 1, 4]], torch.int32),
    ),
    "one key head": (1, 3, 1, 19, 5, make_queries([(0, 18, 0, 19, 0)], [[4, 9, 2]])),
    "left padding, a sequence without rows": (
        3,
        4,
        2,
        31,
        8,
        make_queries([(2, 30, 11, 31, 1), (0, 25, 4, 26, 0), (2, 28, 11, 29, 1)], [range(5, 20), range(12, 25)]),
    ),
    "packed neighbours, rows in any order": (
        1,
        6,
        2,
        60,
        8,
        make_queries(
            [(0, 59, 38, 60, 2), (0, 17, 0, 18, 0), (0, 36, 20, 37, 1), (0, 19, 0, 20, 0), (0, 55, 38, 56, 2)],
            [range(2, 15), range(21, 30), range(40, 50)],
        ),
    ),
    "sliding window, keys in the set but out of range": (
        1,
        4,
        2,
        50,
        8,
        make_queries([(0, t, t - 15, t + 1, 0) for t in (20, 30, 49)], [range(10, 40)]),
    ),
    "full softmax, key_end beyond the position": (
        2,
        4,
        2,
        27,
        8,
        make_queries([(0, 5, 0, 27, 0), (1, 9, 0, 21, 0), (1, 9, 0, 27, 0)], [range(3, 25)]),
    ),
    "several rows on one token, other sets and ranges": (
        1,
        4,
        2,
        33,
        8,
        make_queries(
            [(0, 30, 0, 31, 0), (0, 30, 0, 31, 1), (0, 30, 6, 33, 1), (0, 12, 0, 13, 0)],
            [range(2, 12), range(12, 20)],
        ),
    ),
    "padded sets, one of them empty": (
        1,
        4,
        2,
        29,
        8,
        make_queries(
            [(0, 28, 0, 29, 0), (0, 20, 0, 21, 1), (0, 27, 0, 28, 2), (0, 26, 0, 27, 3)],
            [[1, 2, 3, 4, 5, 6], [], [7, 5], [9, 8, 0]],
        ),
    ),
    "keys named several times": (
        1,
        4,
        2,
        29,
        8,
        make_queries([(0, 28, 0, 29, 0), (0, 20, 0, 21, 1)], [[3, 3, 8, 3, 3], [0, 0, 1, 8, 8]]),
    ),
    "one range within another": (
        1,
        4,
        2,
        40,
        8,
        make_queries([(0, 39, 0, 40, 0), (0, 9, 5, 10, 0), (0, 30, 20, 31, 0)], [range(2, 38)]),
    ),
    "one position in two sequences": (
        2,
        4,
        2,
        21,
        8,
        make_queries([(0, 15, 0, 16, 0), (1, 15, 0, 16, 0), (0, 16, 0, 17, 0)], [range(2, 15)]),
    ),
    "keys at the edges of chunks": (
        4,
        2,
        1,
        400,
        4,
        make_queries([(b, 390, 0, 391, b) for b in range(4)], [[127], [128], [383], [384]]),
    ),
    "several chunks": (
        2,
        6,
        2,
        431,
        8,
        make_queries(
            [(0, 430, 0, 431, 0), (0, 300, 120, 301, 0), (1, 200, 0, 201, 1), (1, 400, 7, 401, 1)],
            [range(9, 391), [0, 127, 128, 129, 255, 256, 300, 399]],
        ),
    ),
    "softmax over blocks, one a patch": (
        2,
        14,
        2,
        75,
        8,
        over_sets(
            [(b, t, 4 * b + patch) for b in (1, 0) for t in (70, 74) for patch in range(4)],
            [range(first, first + 9) for b in (0, 1) for first in range(3 + b, 39, 9)],
        ),
    ),
    "softmax over scattered sets, keys after the row too": (
        2,
        4,
        2,
        45,
        8,
        over_sets(
            [(0, 20, 0), (1, 3, 1), (0, 21, 1), (1, 44, 2), (0, 20, 2)],
            [[40, 3, 17, 18, 9], [5, 6, 7, 8, 30, 31, 1], [44, 2, 1]],
        ),
    ),
    "softmax over sets, keys named several times, one empty": (
        1,
        4,
        2,
        29,
        8,
        over_sets([(0, 28, 0), (0, 20, 1), (0, 21, 2), (0, 25, 3)], [[3, 3, 8, 3, 4], [0, 0, 1, 2, 8], [], [7, 8, 9]]),
    ),
    "cells without a token": (
        1,
        4,
        2,
        29,
        8,
        make_queries(
            [(0, 28, 0, 29, 0), (0, 20, 2, 21, 1), (0, 25, 0, 26, 2)],
            [[-1, 3, -1, 4, *range(9, 24)], [7, -1, 9, -1, *range(11, 19)], [-1, -1]],
        ),
    ),
    "softmax over cells without a token": (
        1,
        4,
        2,
        29,
        8,
        over_sets([(0, 28, 0), (0, 20, 1), (0, 25, 2)], [[-1, 3, -1, 4, 8], [7, -1, 9], [-1, -1]]),
    ),
    "softmax over one key": (1, 2, 1, 9, 8, over_sets([(0, 8, 0), (0, 7, 1)], [[4], [2, 3]], torch.int32)),
    "softmax over sets of several chunks": (
        1,
        4,
        2,
        431,
        8,
        over_sets([(0, 430, 0), (0, 400, 1), (0, 401, 1)], [range(9, 391), [*range(0, 200), *range(250, 300)]]),
    ),
}


def strided(tensor, layout):
    """The same values [B, H, L, D] in other strides."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":  # memory order [B, L, H, D], as after a projection
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    batch, num_heads, length, head_dim = tensor.shape
    if layout == "sliced":  # part of a larger buffer, not dense, last stride 2
        buffer = tensor.new_full((batch, num_heads + 1, length + 3, 2 * head_dim), math.nan)
        view = buffer[:, 1:, 2:-1, ::2]
    else:  # "head_dim first"
        view = tensor.new_empty(batch, head_dim, num_heads, length).permute(0, 2, 3, 1)
    return view.copy_(tensor)


def make_inputs(case, dtype=torch.float64, layouts=("contiguous", "contiguous"), seed=0):
    """query, key (both leaves), queries, random gradient of the maps."""
    batch, num_heads, num_key_heads, length, head_dim, queries = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, num_heads, length, head_dim, dtype=torch.float64, generator=generator).mul_(1.5)
    key = torch.randn(batch, num_key_heads, length, head_dim, dtype=torch.float64, generator=generator).mul_(1.5)
    grad = torch.randn(len(queries), queries.key_sets.shape[1], dtype=torch.float64, generator=generator)
    query, key = (
        strided(t.to(dtype), layout).requires_grad_() for t, layout in zip((query, key), layouts, strict=True)
    )
    return query, key, queries, grad


@triton_on_device
def run(query, key, queries, grad, **options):
    """maps, ∂query, ∂key"""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    maps = noun_attention(query, key, queries, **options)
    return maps.detach(), *torch.autograd.grad(maps, (query, key), grad.to(maps.dtype))


def softmax_keys(queries):
    """The keys of the softmax of each row, a list."""
    if queries.over == "set":
        return [sorted(set(queries.key_sets[g].tolist()) - {-1}) for g in queries.key_set.tolist()]
    return [list(range(lo, hi)) for lo, hi in zip(queries.key_start.tolist(), queries.key_end.tolist(), strict=True)]


def log_sum_exp(query, key, queries, scale):
    """[R, Hq] in float64, by the formula."""
    group = query.shape[1] // key.shape[1]
    rows, tokens = [], zip(queries.sequence.tolist(), queries.position.tolist(), strict=True)
    for (b, t), keys in zip(tokens, softmax_keys(queries), strict=True):
        k = key[b, :, keys].double().repeat_interleave(group, dim=0)  # [Hq, keys, D]
        rows.append((scale * (k @ query[b, :, t].double()[..., None])).squeeze(-1).logsumexp(-1))
    return torch.stack(rows).detach()


def formulas(query, key, queries, grad, scale):
    """maps, ∂query, ∂key in float64 by the formulas, one row, head and key at a time."""
    num_heads, group = query.shape[1], query.shape[1] // key.shape[1]
    query, key = query.detach().double(), key.detach().double()
    maps, grad_query, grad_key = grad.new_zeros(grad.shape), torch.zeros_like(query), torch.zeros_like(key)
    rows = zip(queries.sequence.tolist(), queries.position.tolist(), queries.key_set.tolist(), strict=True)
    for r, ((b, t, g), keys) in enumerate(zip(rows, softmax_keys(queries), strict=True)):
        columns = queries.key_sets[g].tolist()
        for h in range(num_heads):
            q, k = query[b, h, t], key[b, h // group]
            exponentials = {j: torch.exp(scale * q.dot(k[j])) for j in keys}
            total = sum(exponentials.values())
            p = {j: e / total for j, e in exponentials.items()}
            upstream = dict.fromkeys(p, 0.0)
            for n, j in enumerate(columns):
                if j in p:
                    maps[r, n] += p[j] / num_heads
                    upstream[j] += grad[r, n] / num_heads
            delta = sum(p[j] * upstream[j] for j in p)
            for j in p:
                ds = p[j] * (upstream[j] - delta)
                grad_query[b, h, t] += scale * ds * k[j]
                grad_key[b, h // group, j] += scale * ds * q
    return maps, grad_query, grad_key
