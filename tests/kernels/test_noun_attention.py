"""Noun attention against the formulas and against float64, values and gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from swim_kernels import noun_attention
from tests.kernels.budget import assert_within_budget
from tests.kernels.noun_attention_cases import (
    BACKENDS,
    CASES,
    formulas,
    log_sum_exp,
    make_inputs,
    make_queries,
    reference,
    run,
    softmax_keys,
    torch_backend,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if "chunks" not in case])
def test_formulas(case, backend, grouping):
    query, key, queries, grad = make_inputs(case)
    scale = 0.3
    expected = formulas(query, key, queries, grad, scale)
    actual = run(query, key, queries, grad, scale=scale, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("given_lse", [False, True], ids=["own lse", "given lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_against_float64(case, dtype, given_lse, grouping, small_chunks):
    layouts = [("contiguous", "transposed"), ("sliced", "contiguous"), ("transposed", "head_dim first")]
    samples = []
    for seed, layout in enumerate(2 * layouts):
        query, key, queries, grad = make_inputs(case, dtype, layout, seed)
        grad = grad.float()
        lse = log_sum_exp(query, key, queries, query.shape[-1] ** -0.5).float() if given_lse else None
        exact = run(query.double(), key.double(), queries, grad, backend="eager")
        eager = run(query, key, queries, grad, lse=lse, backend="eager")
        samples.append((run(query, key, queries, grad, lse=lse, backend="torch"), eager, exact))
    assert_within_budget(samples)


@pytest.mark.parametrize("case", CASES)
def test_torch_equals_eager_in_float64(case, grouping, small_chunks):
    for given in (False, True):
        query, key, queries, grad = make_inputs(case, layouts=("head_dim first", "sliced"))
        lse = log_sum_exp(query, key, queries, query.shape[-1] ** -0.5) if given else None
        eager, actual = (run(query, key, queries, grad, lse=lse, backend=backend) for backend in BACKENDS[:2])
        for a, e in zip(actual, eager, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("given_lse", [False, True], ids=["own lse", "given lse"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["left padding, a sequence without rows", "keys named several times"])
def test_gradcheck(case, backend, given_lse):
    query, key, queries, _ = make_inputs(case)

    def op(query, key):
        # lse is computed from the same inputs but handed over as a constant: the gradient is the full one all the same
        lse = log_sum_exp(query, key, queries, 0.4) if given_lse else None
        return noun_attention(query, key, queries, scale=0.4, lse=lse, backend=backend)

    assert torch.autograd.gradcheck(op, (query, key), fast_mode=True)


def test_probabilities_sum_to_one_and_causal_attention_is_reproduced():
    """Against torch's own attention: with one-hot values its output is the matrix of probabilities."""
    query, key, _, _ = make_inputs("group of 7", torch.float32)
    length = query.shape[2]
    queries = make_queries([(0, t, 0, t + 1, 0) for t in (0, 17, 40)], [range(length)])
    value = torch.eye(length).expand(1, key.shape[1], length, length)
    attention = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    maps = noun_attention(query, key, queries)
    torch.testing.assert_close(maps, attention[0, :, [0, 17, 40]].mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maps.sum(1), torch.ones(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_that_is_a_block_does_what_its_range_does(backend, grouping):
    query, key, queries, grad = make_inputs("softmax over blocks, one a patch")
    start, end = queries.reach()
    ranges = replace(queries, key_start=start, key_end=end, over="range")
    assert not queries.has_gaps
    for a, e in zip(*(run(query, key, q, grad, backend=backend) for q in (queries, ranges)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softmax_over_sets_sums_to_one_and_touches_only_them(backend, grouping):
    query, key, queries, grad = make_inputs("softmax over scattered sets, keys after the row too")
    maps, _, grad_key = run(query, key, queries, grad, backend=backend)
    torch.testing.assert_close(maps.sum(1), torch.ones(len(queries), dtype=maps.dtype))
    named = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool)
    for b, keys in zip(queries.sequence.tolist(), softmax_keys(queries), strict=True):
        named[b, keys] = True
    assert queries.has_gaps and torch.equal(grad_key.ne(0).any(dim=1).any(dim=-1), named)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_used_and_constant(backend):
    query, key, queries, grad = make_inputs("packed neighbours, rows in any order", torch.float32)
    lse = log_sum_exp(query, key, queries, 0.5).float()
    plain = run(query, key, queries, grad, scale=0.5, backend=backend)
    for layout in (lse, lse.t().contiguous().t()):
        for a, e in zip(run(query, key, queries, grad, scale=0.5, lse=layout, backend=backend), plain, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    shifted = run(query, key, queries, grad, scale=0.5, lse=lse + math.log(2), backend=backend)
    torch.testing.assert_close(shifted[0], plain[0] / 2, rtol=1e-4, atol=1e-6)
    lse.requires_grad_()
    noun_attention(query, key, queries, scale=0.5, lse=lse, backend=backend).sum().backward()
    assert lse.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_gradients_are_zero(backend, grouping):
    query, key, queries, grad = make_inputs("left padding, a sequence without rows")
    _, grad_query, grad_key = run(query, key, queries, grad, backend=backend)
    tagged = torch.zeros(query.shape[0], query.shape[2], dtype=torch.bool)
    tagged[queries.sequence, queries.position] = True
    in_range = torch.zeros_like(tagged)
    for b, lo, hi in ((2, 11, 31), (0, 4, 26)):
        in_range[b, lo:hi] = True
    # exactly, and nowhere else: keys in no key set have a gradient through the softmax
    assert torch.equal(grad_query.ne(0).any(dim=(1))[..., 0], tagged)
    assert torch.equal(grad_key.ne(0).any(dim=(1))[..., 0], in_range)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_out_of_range_have_probability_zero(backend, grouping):
    query, key, queries, grad = make_inputs("sliding window, keys in the set but out of range")
    maps = noun_attention(query, key, queries, backend=backend)
    keys = queries.key_sets[queries.key_set]
    inside = (keys >= queries.key_start[:, None]) & (keys < queries.key_end[:, None])
    assert not inside.all() and inside.any()
    assert torch.equal(maps > 0, inside)
    # what arrives at a column out of range goes nowhere
    expected = run(query, key, queries, grad.masked_fill(~inside, 0.0), backend=backend)
    for a, e in zip(run(query, key, queries, grad, backend=backend), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_ignores_its_gradient(backend, grouping):
    query, key, queries, grad = make_inputs("padded sets, one of them empty")
    padding = queries.key_sets[queries.key_set] < 0
    maps, *gradients = run(query, key, queries, grad, backend=backend)
    assert torch.equal(maps == 0, padding)
    _, *expected = run(query, key, queries, grad.masked_fill(padding, math.nan), backend=backend)
    for a, e in zip(gradients, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_named_several_times_add_up(backend, grouping):
    """Every column is read out; their gradients add up, as if the key had been named once with the sum."""
    query, key, _, _ = make_inputs("plain")
    twice = make_queries([(0, 30, 0, 31, 0)], [[5, 9, 5, 5]])
    once = make_queries([(0, 30, 0, 31, 0)], [[5, 9]])
    maps, *gradients = run(query, key, twice, torch.tensor([[1.0, -2.0, 0.5, 4.0]]), backend=backend)
    maps_once, *expected = run(query, key, once, torch.tensor([[5.5, -2.0]]), backend=backend)
    assert torch.equal(maps, maps_once[:, [0, 1, 0, 0]])
    for a, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows, sets, width",
    [([], [[1, 2]], 2), ([], [], 0), ([(0, 5, 0, 6, 0)], [[]], 0), ([(0, 5, 0, 6, 0)], [[-1, -1]], 2)],
    ids=["R = 0", "G = 0", "N = 0", "only padding"],
)
def test_nothing_to_read(backend, rows, sets, width, grouping):
    query, key, _, _ = make_inputs("plain", torch.bfloat16)
    queries = make_queries(rows, sets)
    maps = noun_attention(query, key, queries, backend=backend)
    assert maps.shape == (len(rows), width) and maps.dtype == torch.float32 and not maps.any()
    maps.sum().backward()
    for tensor in (query, key):
        assert tensor.grad.dtype == torch.bfloat16 and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_empty_range_gives_zeros(grouping):
    """`NounQueries.check` refuses it, but on an accelerator nobody looks: no NaN may come of it."""
    query, key, _, _ = make_inputs("plain")
    queries = make_queries([(0, 5, 6, 6, 0), (0, 9, 0, 10, 0), (0, 12, 9, 3, 0)], [[1, 2, 7]])
    lse = log_sum_exp(query, key, queries, 1.0)
    assert lse.isinf().any()
    for given in (None, lse):
        for function in (reference.noun_attention_eager, torch_backend.noun_attention_torch):
            maps = function(query, key, queries, 1.0, given)
            assert maps[1].all() and not maps[[0, 2]].any()
            grad_query, grad_key = torch.autograd.grad(maps.sum(), (query, key))
            assert grad_query[:, :, 9].all() and not grad_query[:, :, [5, 12]].any()
            assert grad_key.isfinite().all()
    only_empty = make_queries([(0, 5, 6, 6, 0)], [[1, 2, 7]])
    assert not torch_backend.noun_attention_torch(query, key, only_empty, 1.0).any()
