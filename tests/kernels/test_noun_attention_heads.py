"""Maps of each head: against those of a single head, against float64, and weighed."""

from __future__ import annotations

import pytest
import torch

from swim_kernels import noun_attention
from tests.kernels.budget import assert_within_budget
from tests.kernels.noun_attention_cases import BACKENDS, CASES, log_sum_exp, make_inputs, make_queries, run
from tests.kernels.test_noun_attention_graph import LargestOutput


def make_heads(case, *options, **more):
    """As `make_inputs`, with a gradient [R, Hq, N]."""
    query, key, queries, grad = make_inputs(case, *options, **more)
    generator = torch.Generator().manual_seed(1)
    shape = len(grad), query.shape[1], grad.shape[1]
    return query, key, queries, torch.randn(shape, dtype=torch.float64, generator=generator)


def single_heads(query, key, queries, grad):
    """The same maps and gradients from calls with one head."""
    group = query.shape[1] // key.shape[1]
    maps = [
        noun_attention(query[:, h : h + 1], key[:, h // group, None], queries, scale=0.3, backend="eager")
        for h in range(query.shape[1])
    ]
    maps = torch.stack(maps, dim=1)
    return maps, *torch.autograd.grad(maps, (query, key), grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_each_is_a_map_of_a_single_head(case, backend, grouping, small_chunks):
    inputs = make_heads(case, layouts=("transposed", "sliced"))
    actual = run(*inputs, heads="each", scale=0.3, backend=backend)
    for a, e in zip(actual, single_heads(*inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("given_lse", [False, True], ids=["own lse", "given lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_against_float64(case, dtype, given_lse, grouping, small_chunks):
    layouts = [("contiguous", "transposed"), ("sliced", "contiguous"), ("transposed", "head_dim first")]
    samples = []
    for seed, layout in enumerate(2 * layouts):
        query, key, queries, grad = make_heads(case, dtype, layout, seed=seed)
        grad = grad.float()
        lse = log_sum_exp(query, key, queries, query.shape[-1] ** -0.5).float() if given_lse else None
        exact = run(query.double(), key.double(), queries, grad, heads="each", backend="eager")
        eager, actual = (run(query, key, queries, grad, heads="each", lse=lse, backend=name) for name in BACKENDS)
        samples.append((actual, eager, exact))
    assert_within_budget(samples)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    query, key, queries, _ = make_heads("keys named several times")

    def op(query, key):
        return noun_attention(query, key, queries, heads="each", backend=backend)

    assert torch.autograd.gradcheck(op, (query, key), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_weights_give_the_mean(backend):
    query, key, queries, grad = make_inputs("group of 7")
    weights = torch.full((len(queries), 28, 1), 1 / 28, dtype=query.dtype, requires_grad=True)
    maps = noun_attention(query, key, queries, heads="each", backend=backend)
    weighed = (weights * maps).sum(1)
    actual = (weighed, *torch.autograd.grad(weighed, (query, key, weights), grad))
    for a, e in zip(actual, run(query, key, queries, grad, backend=backend), strict=False):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(actual[3][..., 0], torch.einsum("rhn,rn->rh", maps, grad))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows, sets, width",
    [([], [[1, 2]], 2), ([], [], 0), ([(0, 5, 0, 6, 0)], [[]], 0), ([(0, 5, 0, 6, 0)], [[-1, -1]], 2)],
    ids=["R = 0", "G = 0", "N = 0", "only padding"],
)
def test_nothing_to_read(backend, rows, sets, width, grouping):
    query, key, _, _ = make_inputs("plain", torch.bfloat16)
    maps = noun_attention(query, key, make_queries(rows, sets), heads="each", backend=backend)
    assert maps.shape == (len(rows), 4, width) and maps.dtype == torch.float32 and not maps.any()
    maps.sum().backward()
    for tensor in (query, key):
        assert tensor.grad.dtype == torch.bfloat16 and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_nothing_larger_than_the_maps():
    """Of keys that are not read out there are scores of a chunk only."""
    query, key = torch.randn(1, 8, 6000, 4, requires_grad=True), torch.randn(1, 2, 6000, 4, requires_grad=True)
    queries = make_queries([(0, t, 0, t + 1, 0) for t in range(5900, 6000)], [range(2000, 2600)])
    with LargestOutput() as mode:
        maps = noun_attention(query, key, queries, heads="each", backend="torch")
        maps.sum().backward()
    assert mode.numel == maps.numel() < 100 * 8 * 6000 / 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_never_read_back_from_a_device(backend):
    query, key, queries, _ = make_inputs("packed neighbours, rows in any order", torch.bfloat16)
    query, key = (t.detach().to("meta").requires_grad_() for t in (query, key))
    maps = noun_attention(query, key, queries.to("meta"), heads="each", backend=backend)
    assert maps.shape == (len(queries), query.shape[1], queries.key_sets.shape[1])
    maps.sum().backward()
    assert query.grad.shape == query.shape


def test_unknown_heads_are_refused():
    query, key, queries, _ = make_inputs("plain")
    with pytest.raises(ValueError, match="unknown heads 'all': choose one of mean, each"):
        noun_attention(query, key, queries, heads="all")
