"""Noun attention in Triton against float64, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from swim_kernels import noun_attention
from tests.kernels.budget import assert_within_budget
from tests.kernels.device import on_device, skip_without_memory
from tests.kernels.noun_attention_cases import CASES, log_sum_exp, make_inputs, make_queries, run
from tests.kernels.triton_interpreter.cases import backend, random_inputs, random_queries

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(query, key, queries, grad, given_lse=False):
    """(triton, eager, exact)"""
    lse = log_sum_exp(query, key, queries, query.shape[-1] ** -0.5).float() if given_lse else None
    exact = run(query.double(), key.double(), queries, grad, backend="eager")
    eager, actual = (run(query, key, queries, grad, lse=lse, backend=name) for name in ("eager", "triton"))
    return actual, eager, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype):
    layouts = [("contiguous", "transposed"), ("sliced", "contiguous"), ("transposed", "head_dim first")]
    samples = []
    for seed, layout in enumerate(layouts):
        query, key, queries, grad = make_inputs(case, dtype, layout, seed)
        samples.append(sample(query, key, queries, grad.float(), given_lse=seed == 1))
    assert_within_budget(samples)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(dtype):
    """More than fit one tile: blocks, in several sequences and key sets, ∂q and ∂k in passes of their own."""
    queries = random_queries(40, batch=2, length=110, num_sets=2, num_columns=70)
    query, key, grad = random_inputs(queries, 2, 10, 2, 110, 16, dtype)
    assert_within_budget([sample(query, key, queries, grad)])


def test_512_rows():
    queries = random_queries(512, batch=1, length=67, num_sets=1, num_columns=40)
    query, key, grad = random_inputs(queries, 1, 2, 1, 67, 16, torch.bfloat16)
    assert_within_budget([sample(query, key, queries, grad)])


@pytest.mark.parametrize("num_rows", [3, 40])
def test_several_splits(num_rows, launches):
    """Long enough that lse, δ and ∂q are put together from partials, of splits with one tile more or less."""
    length = 1301
    queries = random_queries(num_rows, batch=1, length=length, num_sets=1, num_columns=1290)
    query, key, grad = random_inputs(queries, 1, 4, 2, length, 16, torch.bfloat16)
    assert_within_budget([sample(query, key, queries, grad)])
    splits = {launch.name: launch.grid[0] for launch in launches}
    gradients = "gradients" if num_rows == 3 else "query_gradients"
    assert (splits["lse_partials"], splits["delta_partials"], splits[gradients]) == (10, 10, 2)


@pytest.mark.parametrize("num_heads, num_key_heads", [(1, 1), (4, 4), (2, 1), (6, 2), (5, 1), (7, 1), (16, 2), (16, 1)])
def test_groups(num_heads, num_key_heads):
    for num_rows in (3, 37):
        queries = random_queries(num_rows, batch=1, length=75, num_sets=1, num_columns=33)
        query, key, grad = random_inputs(queries, 1, num_heads, num_key_heads, 75, 16)
        assert_within_budget([sample(query, key, queries, grad)])


@pytest.mark.parametrize("head_dim", [1, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_head_dims(head_dim, dtype):
    for num_rows in (4, 20):
        queries = random_queries(num_rows, batch=1, length=70, num_sets=1, num_columns=50)
        query, key, grad = random_inputs(queries, 1, 14, 2, 70, head_dim, dtype)
        assert_within_budget([sample(query, key, queries, grad)])


def test_probabilities_sum_to_one():
    queries = make_queries([(0, t, 0, t + 1, 0) for t in (0, 17, 99)], [range(100)])
    query, key, _ = random_inputs(queries, 1, 14, 2, 100, 32)
    maps = noun_attention(*on_device([query, key, queries]), backend="triton")
    torch.testing.assert_close(maps.sum(1).cpu(), torch.ones(3))


def test_lse_is_used_and_constant():
    query, key, queries, grad = make_inputs("packed neighbours, rows in any order", torch.float32)
    lse = log_sum_exp(query, key, queries, 0.5).float()
    plain = run(query, key, queries, grad, scale=0.5, backend="triton")
    for layout in (lse, lse.t().contiguous().t()):
        for a, e in zip(run(query, key, queries, grad, scale=0.5, lse=layout, backend="triton"), plain, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    shifted = run(query, key, queries, grad, scale=0.5, lse=lse + math.log(2), backend="triton")
    torch.testing.assert_close(shifted[0], plain[0] / 2, rtol=1e-4, atol=1e-6)
    query, key, queries, lse = on_device([query, key, queries, lse.requires_grad_()])
    noun_attention(query, key, queries, scale=0.5, lse=lse, backend="triton").sum().backward()
    assert lse.grad is None


@pytest.mark.parametrize("num_rows", [2, 60])
def test_where_gradients_are_zero(num_rows):
    """Exactly 0 where nothing can flow, and nowhere else: keys in no key set have a gradient through the softmax."""
    length = 200
    rows = [(2, 150 - r, 70, 151 - r, 0) for r in range(num_rows)]
    queries = make_queries(rows, [range(75, 80)])
    query, key, grad = random_inputs(queries, 3, 4, 2, length, 16)
    _, grad_query, grad_key = run(query, key, queries, grad, backend="triton")
    tagged, in_range = torch.zeros(3, length, dtype=torch.bool), torch.zeros(3, length, dtype=torch.bool)
    tagged[queries.sequence, queries.position] = True
    in_range[2, 70:151] = True
    assert torch.equal(grad_query.ne(0).any(dim=1)[..., 0], tagged)
    assert torch.equal(grad_key.ne(0).all(dim=1).all(dim=-1), in_range)
    assert torch.equal(grad_key.ne(0).any(dim=1).any(dim=-1), in_range)


def test_padding_ignores_its_gradient():
    query, key, queries, grad = make_inputs("padded sets, one of them empty", torch.float32)
    padding = queries.key_sets[queries.key_set] < 0
    maps, *gradients = run(query, key, queries, grad, backend="triton")
    assert torch.equal(maps == 0, padding)
    _, *expected = run(query, key, queries, grad.masked_fill(padding, math.nan), backend="triton")
    for a, e in zip(gradients, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    "rows, sets, width",
    [([], [[1, 2]], 2), ([], [], 0), ([(0, 5, 0, 6, 0)], [[]], 0), ([(0, 5, 0, 6, 0)], [[-1, -1]], 2)],
    ids=["R = 0", "G = 0", "N = 0", "only padding"],
)
@pytest.mark.parametrize("given_lse", [False, True])
def test_nothing_to_read(rows, sets, width, given_lse):
    query, key, _, _ = make_inputs("plain", torch.bfloat16)
    queries = make_queries(rows, sets)
    lse = torch.zeros(len(rows), 4) if given_lse else None
    query, key, queries, lse = on_device([query, key, queries, lse])
    maps = noun_attention(query, key, queries, lse=lse, backend="triton")
    assert maps.shape == (len(rows), width) and maps.dtype == torch.float32 and not maps.any()
    maps.sum().backward()
    for tensor in (query, key):
        assert tensor.grad.dtype == torch.bfloat16 and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_empty_range_gives_zeros():
    """`NounQueries.check` refuses it, but on an accelerator nobody looks: no NaN may come of it."""
    query, key, _, _ = make_inputs("plain", torch.float32)
    queries = make_queries([(0, 5, 6, 6, 0), (0, 9, 0, 10, 0), (0, 12, 9, 3, 0)], [[1, 2, 7]])
    given = log_sum_exp(query, key, queries, 1.0).float()
    query, key, queries, given = on_device([query, key, queries, given])
    for lse in (None, given):
        maps = backend.noun_attention_triton(query, key, queries, 1.0, lse)
        assert maps[1].all() and not maps[[0, 2]].any()
        grad_query, grad_key = torch.autograd.grad(maps.sum(), (query, key))
        assert grad_query[:, :, 9].all() and not grad_query[:, :, [5, 12]].any()
        assert grad_key.isfinite().all()


def test_values_out_of_range_read_no_foreign_memory():
    """Nobody looks at them on an accelerator: wrong maps, but of memory that is there."""
    query, key, _, _ = make_inputs("plain", torch.float32)
    queries = make_queries([(7, 99, -5, 1000, 3), (-2, -1, 0, 5, -1)], [[1, 900, 5], [3, 2, 10**6]])
    query, key, queries = on_device([query, key, queries])
    maps = backend.noun_attention_triton(query, key, queries, 1.0)
    assert maps.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(maps.sum(), (query, key)))


@pytest.mark.parametrize("num_rows", [2, 40])
def test_offsets_beyond_32_bits(num_rows, monkeypatch):
    """Elements more than 2³¹ apart, as in 600 k packed tokens. Memory is reserved, and used only where they are."""
    torch.use_deterministic_algorithms(False)  # it would fill all of it
    skip_without_memory(50)
    length, width = 40, 16
    queries = random_queries(num_rows, batch=1, length=length, num_sets=1, num_columns=30)
    query, key, grad = random_inputs(queries, 1, 4, 2, length, width)
    query, key, grad, queries = on_device([query, key, grad, queries])
    expected = run(query, key, queries, grad, backend="triton")
    step = (2**31 + 2**29) // length // 16 * 16  # between tokens; heads lie side by side

    def far(tensor):
        buffer = torch.empty(length * step, dtype=tensor.dtype, device=tensor.device)
        return buffer.as_strided(tensor.shape, (length * step, width, step, 1))

    far_query, far_key = far(query).copy_(query), far(key).copy_(key)
    assert far_key.stride(2) * (length - 1) > 2**31
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: far(tensor))
    monkeypatch.setattr(torch, "zeros_like", lambda tensor, **_: far(tensor).zero_())
    maps = noun_attention(far_query.requires_grad_(), far_key.requires_grad_(), queries, backend="triton")
    gradients = maps.grad_fn.apply(grad)
    assert gradients[1].stride(2) == gradients[0].stride(2) == step
    for a, e in zip((maps, *gradients[:2]), expected, strict=True):
        assert torch.equal(a, e)
