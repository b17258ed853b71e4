"""Inputs on which the one node is tested, and what attention and maps by themselves say about them."""

from __future__ import annotations

import sys

import pytest
import torch

from swim_kernels import NounQueries, flash_noun_attention, noun_attention
from swim_kernels.flash_noun_attention.providers import base
from swim_kernels.flash_noun_attention.providers import torch as torch_providers
from tests.kernels import flash_stand_ins
from tests.kernels.noun_attention_cases import make_queries, over_sets, strided

LENGTH, HEAD_DIM = 41, 16
STARTS = torch.tensor([0, 13, 30, LENGTH], dtype=torch.int32)  # of packed sequences

# name: (batch, query heads, key heads, rows, key sets, options); instead of rows, queries as they are
CASES = {
    "dense": (
        2,
        4,
        2,
        [(1, 40, 0, 41, 0), (0, 25, 0, 26, 1), (1, 33, 0, 34, 0), (1, 40, 0, 41, 1)],
        [[*range(2, 20)], [5, 3, 21, 3]],
        {},
    ),
    "group of 7": (1, 14, 2, [(0, 40, 0, 41, 0), (0, 22, 0, 23, 0)], [[*range(3, 19)]], {}),
    "packed": (
        1,
        6,
        2,
        [(0, 12, 0, 13, 0), (0, 29, 13, 30, 1), (0, 40, 30, 41, 2), (0, 26, 13, 27, 1)],
        [[*range(1, 9)], [*range(14, 22)], [*range(31, 36)]],
        {"cu_seqlens": STARTS, "max_length": 17},
    ),
    "window": (1, 4, 2, [(0, 40, 29, 41, 0), (0, 7, 0, 8, 0), (0, 20, 9, 21, 0)], [[*range(2, 36)]], {"window": 12}),
    "packed, window": (
        1,
        4,
        1,
        [(0, 29, 22, 30, 0), (0, 15, 13, 16, 0), (0, 40, 33, 41, 1)],
        [[*range(14, 28)], [*range(31, 38)]],
        {"cu_seqlens": STARTS, "max_length": 17, "window": 8},
    ),
    # with a softmax of their own
    "patches": (
        2,
        4,
        2,
        over_sets([(b, t, patch) for b in (1, 0) for t in (40, 22) for patch in range(3)], [range(2, 9), [9, 4], [20]]),
        None,
        {},
    ),
    "packed, patches": (
        1,
        6,
        2,
        over_sets([(0, 12, 0), (0, 29, 1), (0, 40, 2), (0, 26, 1)], [range(1, 9), range(14, 22), range(31, 36)]),
        None,
        {"cu_seqlens": STARTS, "max_length": 17},
    ),
    "all tokens": (1, 4, 2, [(0, 20, 0, 41, 0), (0, 9, 0, 10, 0)], [[*range(2, 30)]], {}),
    "from a later key on": (1, 4, 2, [(0, 20, 3, 21, 0), (0, 20, 0, 21, 0)], [[*range(2, 15)]], {}),
}
# torch on the CPU knows packed sequences, windows and left padding as a mask.
LEFT_PADDED = (2, 4, 2, [(0, 40, 9, 41, 0), (1, 30, 0, 31, 1)], [[*range(10, 20)], [*range(2, 12)]], {"padding": 9})


@pytest.fixture
def stand_ins(monkeypatch):
    """Flash attention libraries that need a GPU, replaced; CPU tensors of any dtype pass for 16-bit ones on CUDA."""
    monkeypatch.setattr(base, "check_half_on_cuda", lambda query: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda parameters: True)
    aten = flash_stand_ins.aten()
    for name in ("_flash_attention_forward", "_flash_attention_backward"):
        monkeypatch.setattr(torch_providers, name, getattr(aten, name))
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda parameters: True)
    for name, operator in (("_cudnn_forward", ""), ("_cudnn_backward", "_backward")):
        stand_in = getattr(aten, f"_scaled_dot_product_cudnn_attention{operator}")
        monkeypatch.setattr(torch_providers, name, stand_in)
    for module, stand_in in (
        ("flash_attn.flash_attn_interface", flash_stand_ins.flash_attn_2()),
        ("flash_attn_interface", flash_stand_ins.flash_attn_3()),
        ("flash_attn.cute.interface", flash_stand_ins.flash_attn_4()),
    ):
        monkeypatch.setitem(sys.modules, module, stand_in)


def sees(options: dict, batch: int) -> torch.Tensor:
    """bool [B, 1, L, L] of the options of a case."""
    token = torch.arange(LENGTH)
    seen = token[:, None] >= token
    if "window" in options:
        seen &= token[:, None] - token < options["window"]
    if "cu_seqlens" in options:
        segment = torch.searchsorted(options["cu_seqlens"], token.int(), right=True)
        seen &= segment[:, None] == segment
    seen = seen.expand(batch, 1, -1, -1).clone()
    if "padding" in options:  # of the first sequence
        seen[0, :, :, : options["padding"]] = False
    return seen


def make(case, dtype=torch.float32, seed=0, layouts=("contiguous", "transposed", "sliced"), heads="mean"):
    """query, key, value, queries, options of the call, gradients of output and maps, whose shape says which heads."""
    batch, num_heads, num_key_heads, rows, key_sets, options = case
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inputs = [
        strided(1.5 * random(batch, heads, LENGTH, HEAD_DIM).to(dtype), layout)
        for heads, layout in zip((num_heads, num_key_heads, num_key_heads), layouts, strict=True)
    ]
    queries = rows if isinstance(rows, NounQueries) else make_queries(rows, key_sets)
    each = (num_heads,) if heads == "each" else ()
    upstream = random(batch, num_heads, LENGTH, HEAD_DIM), random(len(queries), *each, queries.key_sets.shape[1])
    return *inputs, queries, options, upstream


def exact(query, key, value, queries: NounQueries, options, upstream):
    """Output, maps and gradients in float64, from plain attention and plain noun attention."""
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    seen = sees(options, len(query))
    group = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in leaves[1:])
    s = (query.shape[3] ** -0.5 * leaves[0] @ k.transpose(2, 3)).masked_fill(~seen, float("-inf"))
    output = s.softmax(-1).nan_to_num() @ v  # a token of the padding sees nothing
    maps = noun_attention(leaves[0], leaves[1], queries, heads=_heads(upstream), backend="eager")
    return [output, maps, *_gradients((output, maps), leaves, upstream)]


def separate(query, key, value, queries, options, upstream):
    """The same from two nodes, in the precision of the inputs."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=sees(options, len(query)), enable_gqa=True
    )
    maps = noun_attention(leaves[0], leaves[1], queries, backend="torch")
    return [output, maps, *_gradients((output, maps), leaves, upstream)]


def fused(query, key, value, queries, options, upstream, *, provider, backend="torch", as_mask=False):
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    if as_mask:
        options = {"mask": sees(options, len(query))} if options else {}
    results = flash_noun_attention(
        *leaves, queries, heads=_heads(upstream), provider=provider, backend=backend, **options
    )
    return [*results, *_gradients(results, leaves, upstream)]


def _heads(upstream):
    return "each" if upstream[1] is not None and upstream[1].ndim == 3 else "mean"


def _gradients(results, leaves, upstream):
    total = [(r * u.to(r.dtype)).sum() for r, u in zip(results, upstream, strict=True) if u is not None]
    gradients = torch.autograd.grad(sum(total), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def relative_error(actual, expected) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30))
