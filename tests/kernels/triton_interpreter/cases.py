"""Inputs for the Triton kernels beyond those of all backends: many rows, any head dimension and group."""

from __future__ import annotations

import importlib

import torch

from swim_kernels import NounQueries
from tests.kernels.noun_attention_cases import make_queries

backend = importlib.import_module("swim_kernels.noun_attention.triton.launch")
shared = importlib.import_module("swim_kernels.attention_rows.triton.launch")
plans = importlib.import_module("swim_kernels.attention_rows.triton.plan")


def random_queries(num_rows, batch, length, num_sets, num_columns, seed=0) -> NounQueries:
    """Rows in any order, several on one token, ranges with left and right ends anywhere, padded scattered sets."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit):
        return int(torch.randint(limit, (), generator=generator))

    rows = []
    for _ in range(num_rows):
        position = length // 2 + below(length // 2)
        rows.append((below(batch), position, below(position), position + 1, below(num_sets)))
    sets = [torch.randperm(length, generator=generator)[: num_columns - below(9)].tolist() for _ in range(num_sets)]
    return make_queries(rows, sets)


def random_inputs(queries, batch, num_heads, num_key_heads, length, head_dim, dtype=torch.float32, seed=0):
    """query, key in the memory order of a projection, gradient of the maps"""
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(batch, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for heads in (num_heads, num_key_heads)
    )
    grad = torch.randn(len(queries), queries.key_sets.shape[1], generator=generator)
    return query, key, grad
