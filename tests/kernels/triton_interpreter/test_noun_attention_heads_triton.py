"""Maps of each head in Triton against float64, values and gradients, fresh and added."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from swim_kernels import noun_attention
from tests.kernels.budget import assert_within_budget
from tests.kernels.device import on_device
from tests.kernels.noun_attention_cases import CASES, log_sum_exp, make_queries, run, torch_backend
from tests.kernels.test_noun_attention_heads import make_heads
from tests.kernels.triton_interpreter.cases import backend, random_inputs, random_queries, shared

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


def sample(query, key, queries, grad, given_lse=False):
    """(triton, eager, exact)"""
    lse = log_sum_exp(query, key, queries, query.shape[-1] ** -0.5).float() if given_lse else None
    exact = run(query.double(), key.double(), queries, grad, heads="each", backend="eager")
    eager, actual = (
        run(query, key, queries, grad, heads="each", lse=lse, backend=name) for name in ("eager", "triton")
    )
    return actual, eager, exact


def many_inputs(num_rows, *shape, dtype=torch.float32, over="range"):
    """shape: of `random_inputs`: B, Hq, Hkv, L, D."""
    queries = random_queries(num_rows, shape[0], shape[3], num_sets=2, num_columns=shape[3] // 2)
    queries = dataclasses.replace(queries, over=over)
    query, key, grad = random_inputs(queries, *shape, dtype)
    generator = torch.Generator().manual_seed(num_rows)
    return query, key, queries, torch.randn(num_rows, shape[1], grad.shape[1], generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype):
    layouts = [("contiguous", "transposed"), ("sliced", "contiguous"), ("transposed", "head_dim first")]
    samples = []
    for seed, layout in enumerate(layouts):
        query, key, queries, grad = make_heads(case, dtype, layout, seed=seed)
        samples.append(sample(query, key, queries, grad.float(), given_lse=seed == 1))
    assert_within_budget(samples)


@pytest.mark.parametrize("over", ["range", "set"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(dtype, over):
    assert_within_budget([sample(*many_inputs(40, 2, 10, 2, 110, 16, dtype=dtype, over=over))])


@pytest.mark.parametrize("num_rows", [3, 40])
def test_several_splits(num_rows, launches):
    queries = random_queries(num_rows, batch=1, length=1301, num_sets=1, num_columns=1290)
    query, key, _ = random_inputs(queries, 1, 4, 2, 1301, 16, torch.bfloat16)
    grad = torch.randn(num_rows, 4, queries.key_sets.shape[1], generator=torch.Generator().manual_seed(0))
    assert_within_budget([sample(query, key, queries, grad)])
    assert {launch.name: launch.grid[0] for launch in launches}["delta_partials"] == 10


@pytest.mark.parametrize("num_heads, num_key_heads", [(1, 1), (5, 1), (16, 1)])
@pytest.mark.parametrize("head_dim", [1, 80])
def test_groups_and_head_dims(num_heads, num_key_heads, head_dim):
    for num_rows in (3, 20):
        assert_within_budget([sample(*many_inputs(num_rows, 1, num_heads, num_key_heads, 75, head_dim))])


@pytest.mark.parametrize("num_rows", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_gradient_of_any_strides_and_bitwise_repeatable(num_rows):
    *inputs, grad = on_device(many_inputs(num_rows, 2, 7, 1, 64, 32, dtype=torch.bfloat16))
    expected = run(*inputs, grad, heads="each", backend="triton")
    for again in (grad, grad.transpose(0, 2).contiguous().transpose(0, 2)):
        for a, e in zip(run(*inputs, again, heads="each", backend="triton"), expected, strict=True):
            assert torch.equal(a, e)


def test_gradient_of_one_head_in_the_order_of_heads():
    """Such a gradient [R, 1, N] counts as contiguous whatever the stride of its head is."""
    *inputs, grad = on_device(many_inputs(3, 1, 1, 1, 64, 32))
    num_columns = grad.shape[2]
    turned = grad.new_empty_strided(grad.shape, (num_columns, 3 * num_columns, 1)).copy_(grad)
    assert turned.stride() != grad.stride() and turned.is_contiguous()
    expected = run(*inputs, grad, heads="each", backend="triton")
    for a, e in zip(run(*inputs, turned, heads="each", backend="triton"), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("num_rows", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_gradients_are_added_to_what_is_there(num_rows):
    query, key, queries, grad = on_device(many_inputs(num_rows, 2, 10, 2, 110, 16))
    _, *fresh = run(query, key, queries, grad, heads="each", backend="triton", scale=0.25)
    buffers = [torch.ones_like(x) for x in (query, key)]
    maps, lse = backend.maps_and_lse(query, key, queries, 0.25, heads="each")
    assert maps.shape == grad.shape
    backend.add_gradients(*buffers, grad, query, key, queries, 0.25, lse)
    for a, e in zip(buffers, fresh, strict=True):
        torch.testing.assert_close(a - 1, e, rtol=1e-4, atol=1e-5)
    delta, weights = backend.deltas(grad, query, key, queries, 0.25, lse)
    expected = torch.einsum("rhn,rhn->rh", maps, grad)
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
    parts, plain = ([torch.zeros_like(x) for x in (query, key)] for _ in range(2))
    backend.add_gradients(*parts, grad, query, key, queries.within_key_sets(), 0.25, lse, weights)
    torch_backend.add_gradients(*plain, grad, query, key, queries, 0.25, lse, grad)
    for a, e in zip(parts, plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, sets", [([], [[1, 2]]), ([(0, 5, 0, 6, 0)], [[]]), ([(0, 5, 0, 6, 0)], [[-1, -1]])])
def test_nothing_to_read(rows, sets):
    query, key, *_ = make_heads("plain", torch.bfloat16)
    query, key, queries = on_device([query, key, make_queries(rows, sets)])
    maps = noun_attention(query, key, queries, heads="each", backend="triton")
    assert maps.shape == (len(rows), 4, len(sets[0])) and not maps.any()
    maps.sum().backward()
    assert not query.grad.any() and not key.grad.any()


@pytest.mark.real_values
def test_operators_are_registered_properly():
    query, key, queries, grad = on_device(many_inputs(3, 2, 7, 1, 64, 32, dtype=torch.bfloat16))
    plan = shared.plan_tables(query, key, queries)
    lse = backend.log_sum_exp(query, key, plan, 0.2, False)
    torch.library.opcheck(backend.gradients_of, (grad, query, key, lse, plan, 0.2, True, True, False))
    torch.library.opcheck(backend.deltas_of, (grad, query, key, lse, plan, 0.2))
    query.requires_grad_(), key.requires_grad_()
    torch.library.opcheck(backend.maps_of, (query, key, lse, plan, 0.2, False, True))
