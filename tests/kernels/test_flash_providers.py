"""The one node on every flash attention that is there, at head sizes that all of them serve, against float64."""

from __future__ import annotations

import pytest
import torch

from swim_kernels import Unsupported, flash_noun_attention, noun_attention
from swim_kernels.flash_noun_attention.api import PROVIDERS
from swim_kernels.flash_noun_attention.providers.base import Call
from tests.kernels.budget import rms
from tests.kernels.noun_attention_cases import make_queries, over_sets

LENGTH, ENDS = 333, (0, 130, 256, 333)
NAMES = ("output", "maps", "∂query", "∂key", "∂value")


def make_case(kind):
    """queries, options of the call, and bool [L, L]: what each token sees."""
    token = torch.arange(LENGTH)
    seen, options, starts = token[:, None] >= token, {}, [0, 0, 0, 0]
    positions = (250, 100, 332, 200)
    if kind == "packed":
        segment = torch.bucketize(token, torch.tensor(ENDS[1:]), right=True)
        seen &= segment[:, None] == segment
        options = {"cu_seqlens": torch.tensor(ENDS, dtype=torch.int32), "max_length": 130}
        starts = [ENDS[int(segment[position])] for position in positions]
    elif kind == "window":
        seen &= token[:, None] - token < 64
        options = {"window": 64}
        starts = [position - 63 for position in positions]
    sets = [range(220, 245), range(40, 90), range(280, 320), range(150, 190)]
    if kind == "patches":
        return over_sets([(0, t, g) for g, t in enumerate(positions)], sets), options, seen
    rows = [(0, t, start, t + 1, g) for g, (t, start) in enumerate(zip(positions, starts, strict=True))]
    return make_queries(rows, sets), options, seen


def gradients(results, leaves, upstream):
    total = sum((result * grad.to(result.dtype)).sum() for result, grad in zip(results, upstream, strict=True))
    return [*(result.detach() for result in results), *torch.autograd.grad(total, leaves)]


ON_GPU = pytest.mark.cuda  # enough on the CPU without


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=ON_GPU)], ids=str)
@pytest.mark.parametrize("kind, group", [("dense", 1), ("grouped", 7), ("packed", 7), ("window", 4), ("patches", 7)])
@pytest.mark.parametrize("name", PROVIDERS)
def test_against_float64_beside_separate_nodes(name, kind, group, dtype, head_dim, device):
    queries, options, seen = make_case(kind)
    queries, seen = queries.to(device), seen.to(device)
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    generator = torch.Generator().manual_seed(0)

    def random(heads, *shape):
        values = torch.randn(1, LENGTH, heads, head_dim, generator=generator).to(device, dtype)
        return values.transpose(1, 2)

    tensors = [random(heads) for heads in (2 * group, 2, 2)]
    upstream = random(2 * group), torch.randn(len(queries), queries.key_sets.shape[1], generator=generator).to(device)
    call = Call(head_dim**-0.5, options.get("window"), None, options.get("cu_seqlens"), options.get("max_length"))
    try:
        PROVIDERS[name].check(*tensors, call)
    except Unsupported as reason:
        pytest.skip(f"{name}: {reason}")

    def separate(dtype):
        query, key, value = leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scores = (query @ keys.mT * head_dim**-0.5).masked_fill(~seen, float("-inf"))
        output = scores.softmax(-1) @ values
        maps = noun_attention(query, key, queries, backend="eager" if dtype == torch.float64 else "auto")
        return gradients((output, maps), leaves, upstream)

    leaves = [x.detach().requires_grad_() for x in tensors]
    results = flash_noun_attention(*leaves, queries, provider=name, **options)
    actual = gradients(results, leaves, upstream)
    for what, a, s, e in zip(NAMES, actual, separate(dtype), separate(torch.float64), strict=True):
        error, allowed = (rms([x.double() - e]) for x in (a, s))
        budget = 2 * allowed + torch.finfo(dtype).eps * rms([e])
        assert error <= budget, f"{what}: error {error:.2e} above the budget {budget:.2e}"
