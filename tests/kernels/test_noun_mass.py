"""Noun mass against the formulas, against float64 and against sums over maps, values and gradients."""

from __future__ import annotations

import pytest
import torch

from swim_kernels import noun_attention, noun_mass
from swim_kernels.noun_mass.reference import noun_mass_eager
from swim_kernels.noun_mass.torch_backend import noun_mass_torch
from tests.kernels.budget import assert_within_budget
from tests.kernels.noun_attention_cases import BACKENDS, log_sum_exp, make_queries, over_sets
from tests.kernels.noun_mass_cases import CASES, formulas, make_inputs, make_sets, run

NAMES = ("masses", "∂query", "∂key")
LAYOUTS = [("contiguous", "transposed"), ("sliced", "contiguous"), ("transposed", "head_dim first")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if "chunks" not in case])
def test_formulas(case, backend, grouping):
    inputs = make_inputs(case)
    actual = run(*inputs, scale=0.3, backend=backend)
    for a, e in zip(actual, formulas(*inputs, scale=0.3), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("given_lse", [False, True], ids=["own lse", "given lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_against_float64(case, dtype, given_lse, grouping, small_chunks):
    samples = []
    for seed, layout in enumerate(2 * LAYOUTS):
        query, key, queries, sets, grad = make_inputs(case, dtype, layout, seed)
        grad = grad.float()
        lse = log_sum_exp(query, key, queries, query.shape[-1] ** -0.5).float() if given_lse else None
        exact = run(query.double(), key.double(), queries, sets, grad, backend="eager")
        eager, actual = (run(query, key, queries, sets, grad, lse=lse, backend=name) for name in BACKENDS)
        samples.append((actual, eager, exact))
    assert_within_budget(samples, NAMES)


@pytest.mark.parametrize("given_lse", [False, True], ids=["own lse", "given lse"])
@pytest.mark.parametrize("case", CASES)
def test_torch_equals_eager_in_float64(case, given_lse, grouping, small_chunks):
    query, key, queries, sets, grad = make_inputs(case, layouts=("head_dim first", "sliced"))
    lse = log_sum_exp(query, key, queries, query.shape[-1] ** -0.5) if given_lse else None
    eager, actual = (run(query, key, queries, sets, grad, lse=lse, backend=name) for name in BACKENDS)
    for a, e in zip(actual, eager, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("given_lse", [False, True], ids=["own lse", "given lse"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", ["left padding, a sequence without rows", "softmax over scattered sets, keys after the row too"]
)
def test_gradcheck(case, backend, given_lse):
    query, key, queries, sets, _ = make_inputs(case)

    def op(query, key):
        # lse is computed from the same inputs but handed over as a constant: the gradient is the full one all the same
        lse = log_sum_exp(query, key, queries, 0.4) if given_lse else None
        return noun_mass(query, key, queries, sets, scale=0.4, lse=lse, backend=backend)

    assert torch.autograd.gradcheck(op, (query, key), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_over_a_map_of_each_head(backend, grouping):
    """Heads as sequences of one head make maps of their own; the masses are sums of their columns."""
    query, key, queries, _, _ = make_inputs("packed neighbours, rows in any order")
    sets = queries.key_sets[:, None]
    grad = torch.randn(len(queries), query.shape[1], 1, dtype=query.dtype)
    masses, *gradients = run(query, key, queries, sets, grad, backend=backend)
    group = query.shape[1] // key.shape[1]
    maps = torch.stack(
        [noun_attention(query[:, h : h + 1], key[:, h // group, None], queries) for h in range(query.shape[1])], dim=1
    )
    expected = maps.sum(-1, keepdim=True)
    expected = (expected, *torch.autograd.grad(expected, (query, key), grad))
    for a, e in zip((masses, *gradients), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["group of 7", "softmax over blocks, one a patch"])
def test_disjoint_sets_of_all_keys_have_mass_one_and_no_gradient(case, backend, grouping):
    query, key, queries, _, _ = make_inputs(case)
    length = key.shape[2]
    halves = make_sets([[range(0, length, 2), range(1, length, 2)]] * len(queries.key_sets))
    masses, *gradients = run(query, key, queries, halves, torch.ones(len(queries), query.shape[1], 2), backend=backend)
    torch.testing.assert_close(masses.sum(-1), torch.ones_like(masses[..., 0]))
    assert all(gradient.abs().max() < 1e-13 for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_have_sets_of_their_own(backend, grouping):
    """Two samples packed into a sequence, and one in another: as each by itself."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 50, 8, generator=generator, dtype=torch.float64) for heads in (4, 2))
    queries = make_queries([(0, 19, 0, 20, 0), (0, 40, 20, 41, 1), (0, 45, 20, 46, 1), (1, 30, 0, 31, 2)], [[]] * 3)
    sets = make_sets([[range(3, 9), [1]], [range(21, 30), range(30, 39)], [[5, 9], range(10, 20)]])
    grad = torch.randn(4, 4, 2, generator=generator)
    masses, *gradients = run(query, key, queries, sets, grad, backend=backend)
    total = [torch.zeros_like(x) for x in (query, key)]
    for r, (b, t, start, end, g) in enumerate(
        [(0, 19, 0, 20, 0), (0, 40, 20, 41, 1), (0, 45, 20, 46, 1), (1, 30, 0, 31, 2)]
    ):
        alone = make_queries([(b, t, start, end, 0)], [[]])
        one, *of_one = run(query, key, alone, sets[g, None], grad[r, None], backend=backend)
        torch.testing.assert_close(masses[r], one[0], rtol=1e-12, atol=1e-14)
        total = [a + b for a, b in zip(total, of_one, strict=True)]
    for a, e in zip(gradients, total, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_gradients_are_zero(backend, grouping):
    query, key, queries, sets, grad = make_inputs("left padding, a sequence without rows")
    _, grad_query, grad_key = run(query, key, queries, sets, grad, backend=backend)
    tagged, in_range = torch.zeros(2, 3, 31, dtype=torch.bool)
    tagged[queries.sequence, queries.position] = True
    in_range[2, 11:31] = in_range[0, 4:26] = True
    # exactly, and nowhere else: keys in no set have a gradient through the softmax
    assert torch.equal(grad_query.ne(0).any(dim=1)[..., 0], tagged)
    assert torch.equal(grad_key.ne(0).any(dim=1)[..., 0], in_range)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_masses_keep_their_digits(backend):
    """A loss of AVAR's kind takes their logarithm."""
    query, key = torch.zeros(1, 1, 40, 4), torch.zeros(1, 1, 40, 4)
    query[..., 0], key[0, 0, :30, 0] = 60.0, 1.0
    queries = make_queries([(0, 39, 0, 40, 0)], [[]])
    masses, *_ = run(query, key, queries, make_sets([[range(30, 40)]]), torch.ones(1, 1, 1), scale=1.0, backend=backend)
    torch.testing.assert_close(masses[0, 0, 0].log(), torch.tensor(10 / 30).log() - 60, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows, groups, num_sets, width",
    [(0, 2, 3, 4), (0, 0, 3, 4), (2, 1, 0, 4), (2, 1, 3, 0), (2, 1, 3, 4)],
    ids=["R = 0", "G = 0", "S = 0", "M = 0", "empty sets"],
)
@pytest.mark.parametrize("over", ["range", "set"])
def test_nothing_to_sum(backend, rows, groups, num_sets, width, over, grouping):
    query, key, *_ = make_inputs("plain", torch.bfloat16)
    queries = make_queries([(0, 5 + r, 0, 6 + r, 0) for r in range(rows)], [[2, 3]] * groups, over=over)
    sets = torch.full((groups, num_sets, width), -1)
    masses = noun_mass(query, key, queries, sets, backend=backend)
    assert masses.shape == (rows, 4, num_sets) and masses.dtype == torch.float32 and not masses.any()
    masses.sum().backward()
    for tensor in (query, key):
        assert tensor.grad.dtype == torch.bfloat16 and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_empty_softmax_gives_zeros(grouping):
    """`NounQueries.check` refuses such a range, but on an accelerator nobody looks: no NaN may come of it."""
    query, key, *_ = make_inputs("plain")
    ranges = make_queries([(0, 5, 6, 6, 0), (0, 9, 0, 10, 0), (0, 12, 9, 3, 0)], [[]])
    empty_set = over_sets([(0, 5, 1), (0, 9, 0), (0, 12, 1)], [[1, 2, 7], []])
    for queries, given in ((ranges, False), (ranges, True), (empty_set, False)):
        lse = log_sum_exp(query, key, queries, 1.0) if given else None
        sets = make_sets([[[1, 2, 7], [30]]] * len(queries.key_sets))
        for function in (noun_mass_eager, noun_mass_torch):
            masses = function(query, key, queries, sets, 1.0, lse)
            assert masses[1, :, 0].all() and not masses[[0, 2]].any()
            grad_query, grad_key = torch.autograd.grad(masses[..., 0].square().sum(), (query, key))
            assert grad_query.isfinite().all() and not grad_query[:, :, [5, 12]].any()
            assert grad_key.isfinite().all()
