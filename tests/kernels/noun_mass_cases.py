"""Inputs on which noun mass is tested, the rows of noun attention with sets of keys, and what the formulas say."""

from __future__ import annotations

import torch

from swim_kernels import noun_mass
from tests.kernels import noun_attention_cases
from tests.kernels.device import triton_on_device
from tests.kernels.noun_attention_cases import CASES, softmax_keys

SETS = 5


def make_sets(groups, dtype=torch.int64):
    """groups: for each group a list of sets of keys, filled up here."""
    width = max((len(keys) for sets in groups for keys in sets), default=0)
    padded = [[[*keys, *[-1] * (width - len(keys))] for keys in sets] for sets in groups]
    return torch.tensor(padded, dtype=dtype).reshape(len(groups), len(groups[0]) if groups else 0, width)


def random_sets(num_groups, length, seed=0, dtype=torch.int64):
    """[G, 5, M]: a block; keys of all the sequence, which overlap with it, in any order and named repeatedly; one key;
    none; all keys. Filled up in front, too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, count=()):
        return torch.randint(low, high, count, generator=generator).tolist()

    groups = []
    for _ in range(num_groups):
        first = draw(0, length)
        scattered = [-1, *draw(0, length, (length // 2 + 1,))]
        groups.append([list(range(first, min(length, first + length // 3 + 1))), scattered, [draw(0, length)], []])
        groups[-1].append(list(range(length)))
    return make_sets(groups, dtype)


def make_inputs(case, dtype=torch.float64, layouts=("contiguous", "contiguous"), seed=0):
    """query, key (both leaves), queries, sets, random gradient of the masses."""
    query, key, queries, _ = noun_attention_cases.make_inputs(case, dtype, layouts, seed)
    sets = random_sets(len(queries.key_sets), key.shape[2], seed, queries.key_sets.dtype)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(len(queries), query.shape[1], SETS, dtype=torch.float64, generator=generator)
    return query, key, queries, sets, grad


@triton_on_device
def run(query, key, queries, sets, grad, **options):
    """masses, ∂query, ∂key"""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    masses = noun_mass(query, key, queries, sets, **options)
    return masses.detach(), *torch.autograd.grad(masses, (query, key), grad.to(masses.dtype))


def formulas(query, key, queries, sets, grad, scale):
    """masses, ∂query, ∂key in float64 by the formulas, one row, head and key at a time."""
    num_heads, group = query.shape[1], query.shape[1] // key.shape[1]
    query, key = query.detach().double(), key.detach().double()
    masses, grad_query, grad_key = torch.zeros_like(grad), torch.zeros_like(query), torch.zeros_like(key)
    rows = zip(queries.sequence.tolist(), queries.position.tolist(), queries.key_set.tolist(), strict=True)
    for r, ((b, t, g), keys) in enumerate(zip(rows, softmax_keys(queries), strict=True)):
        own = [set(members) for members in sets[g].tolist()]
        for h in range(num_heads):
            q, k = query[b, h, t], key[b, h // group]
            exponentials = {j: torch.exp(scale * q.dot(k[j])) for j in keys}
            total = sum(exponentials.values())
            for s, members in enumerate(own):
                if members & exponentials.keys():
                    part = sum(exponentials[j] for j in members & exponentials.keys())
                    masses[r, h, s] = torch.exp(part.log() - total.log())
            through_lse = (masses[r, h] * grad[r, h]).sum()
            for j, e in exponentials.items():
                w = sum(grad[r, h, s] for s, members in enumerate(own) if j in members)
                ds = e / total * (w - through_lse)
                grad_query[b, h, t] += scale * ds * k[j]
                grad_key[b, h // group, j] += scale * ds * q
    return masses, grad_query, grad_key


__all__ = ["CASES", "SETS", "formulas", "make_inputs", "make_sets", "random_sets", "run"]
