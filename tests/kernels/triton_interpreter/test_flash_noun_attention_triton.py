"""The one node with the maps in Triton: gradients are added to those of the attention, in place."""

import pytest
import torch

from tests.kernels.device import on_device
from tests.kernels.flash_noun_attention_cases import (
    CASES,
    exact,
    fused,
    make,
    relative_error,
    separate,
    stand_ins,  # noqa: F401
)
from tests.kernels.triton_interpreter.cases import backend, random_inputs, random_queries, shared

pytestmark = pytest.mark.usefixtures("poisoned", "stand_ins")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", ["torch_cpu", "flash_attn_2", "flash_attn_4"])
def test_against_float64(provider, case):
    *inputs, upstream = make(CASES[case])
    actual = fused(*inputs, upstream, provider=provider, backend="triton", as_mask=provider == "torch_cpu")
    for a, e in zip(actual, exact(*inputs, upstream), strict=True):
        assert relative_error(a, e) <= 1e-6


@pytest.mark.interpreter
def test_16_bits():
    *inputs, upstream = make(CASES["group of 7"], torch.bfloat16)
    expected = exact(*inputs, upstream)
    actual = fused(*inputs, upstream, provider="torch_cpu", backend="triton")
    for a, s, e in zip(actual, separate(*inputs, upstream), expected, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(s, e) + torch.finfo(torch.bfloat16).eps


@pytest.mark.interpreter
@pytest.mark.parametrize("which", [0, 1])
def test_only_output_or_only_maps(which):
    *inputs, upstream = make(CASES["dense"])
    upstream = [u if place == which else None for place, u in enumerate(upstream)]
    actual = fused(*inputs, upstream, provider="torch_cpu", backend="triton")
    for a, e in zip(actual, exact(*inputs, upstream), strict=True):
        assert torch.equal(a.double(), e) if not e.any() else relative_error(a, e) <= 1e-6


@pytest.mark.parametrize("num_rows", [3, 40])
def test_added_to_what_is_there(num_rows):
    """Also where more rows than fit one tile make two passes, and only in reach of the rows."""
    queries = random_queries(num_rows, batch=2, length=110, num_sets=2, num_columns=70)
    query, key, grad, queries = on_device((*random_inputs(queries, 2, 10, 2, 110, 16), queries))
    plan = shared.plan_tables(query, key, queries)
    lse = backend.log_sum_exp(query, key, plan, 0.25, False)
    fresh = backend.gradients_of(grad, query, key, lse, plan, 0.25, True, True, False)
    before = [torch.randn_like(x) for x in (query, key)]
    for wanted in ((True, True), (True, False), (False, True)):
        after = [x.clone() if want else None for x, want in zip(before, wanted, strict=True)]
        backend.add_gradients(*after, grad, query, key, queries, 0.25, lse)
        for a, b, f in zip(after, before, fresh, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b + f, rtol=1e-5, atol=1e-6)
                assert torch.equal(a[f == 0], b[f == 0])


def test_without_delta():
    """δ handed to the attention instead: both parts together are the whole."""
    queries = random_queries(5, batch=2, length=110, num_sets=2, num_columns=70)
    query, key, grad, queries = on_device((*random_inputs(queries, 2, 10, 2, 110, 16), queries))
    plan = shared.plan_tables(query, key, queries)
    lse = backend.log_sum_exp(query, key, plan, 0.25, False)
    delta, weights = backend.deltas(grad, query, key, queries, 0.25, lse)
    from tests.kernels.noun_attention_cases import torch_backend

    expected, _ = torch_backend.deltas(grad, query, key, queries, 0.25, lse)
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)
    parts, plain = ([torch.zeros_like(x) for x in (query, key)] for _ in range(2))
    backend.add_gradients(*parts, grad, query, key, queries.within_key_sets(), 0.25, lse, weights)
    weights = torch_backend.deltas(grad, query, key, queries, 0.25, lse)[1]
    torch_backend.add_gradients(*plain, grad, query, key, queries, 0.25, lse, weights)
    for a, e in zip(parts, plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.interpreter
def test_launches(launches):
    *inputs, upstream = make(CASES["dense"])
    fused(*inputs, upstream, provider="torch_cpu", backend="triton")
    assert [launch.name for launch in launches] == ["maps", "delta_partials", "gradients", "query_gradient_sum"]


@pytest.mark.real_values
def test_operators_are_registered_properly():
    queries = random_queries(3, batch=1, length=70, num_sets=1, num_columns=40)
    query, key, grad, queries = on_device((*random_inputs(queries, 1, 4, 2, 70, 16), queries))
    plan = shared.plan_tables(query, key, queries)
    lse = backend.log_sum_exp(query, key, plan, 0.25, False)
    torch.library.opcheck(backend.deltas_of, (grad, query, key, lse, plan, 0.25))
    buffers = torch.zeros_like(query), torch.zeros_like(key)
    torch.library.opcheck(backend.add_gradients_of, (*buffers, grad, query, key, lse, None, plan, 0.25, False))
