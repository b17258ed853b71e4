"""How noun mass behaves as a node of a graph: repeatable, lean, never waiting for a device; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from swim_kernels import noun_mass
from swim_kernels.attention_rows import row_groups
from tests.kernels.noun_attention_cases import BACKENDS, log_sum_exp, make_queries
from tests.kernels.noun_mass_cases import make_inputs, make_sets, random_sets, run
from tests.kernels.test_noun_attention_graph import LargestOutput


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend, two_threads):
    """Many rows on few tokens, large enough for torch to go parallel."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, heads, 300, 64, generator=generator) for heads in (14, 2))
    queries = make_queries([(r % 2, 290 + r % 3, 0, 291 + r % 3, r % 2) for r in range(48)], [[], []])
    grad = torch.randn(48, 14, 5, generator=generator)
    first = run(query, key, queries, random_sets(2, 300), grad, backend=backend)
    for _ in range(5):
        for a, e in zip(run(query, key, queries, random_sets(2, 300), grad, backend=backend), first, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("given_lse", [False, True], ids=["own lse", "given lse"])
def test_what_is_kept(given_lse):
    """Query rows, the key itself (no copy), lse, masses and the metadata; nothing of R × M or Hq × R × L elements."""
    query, key, queries, sets, _ = make_inputs("several chunks", layouts=("transposed", "transposed"))
    lse = log_sum_exp(query, key, queries, 1.0) if given_lse else None

    def kept(backend):
        tensors = []
        with saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            noun_mass(query, key, queries, sets, scale=1.0, lse=lse, backend=backend)
        return tensors

    num_rows, num_heads, length = len(queries), query.shape[1], query.shape[2]
    tensors = kept("torch")
    assert [t.shape for t in tensors] == [
        (num_rows, num_heads, query.shape[3]),
        key.shape,
        (num_rows, num_heads),
        (num_rows, num_heads, sets.shape[1]),
        sets.shape,
        *(t.shape for t in queries.tensors()),
    ]
    assert tensors[1].data_ptr() == key.data_ptr()
    assert max(t.numel() for t in kept("eager")) >= num_rows * num_heads * length  # the measure can tell


def test_scores_exist_in_chunks_only():
    num_heads, num_rows, length = 12, 16, 4096
    query = torch.randn(1, num_heads, length, 4, requires_grad=True)
    key = torch.randn(1, 2, length, 4, requires_grad=True)
    queries = make_queries([(0, t, 0, t + 1, 0) for t in range(length - num_rows, length)], [[]])
    sets = make_sets([[range(3000), range(2000, 4000)]])
    largest = {}
    for backend in BACKENDS:
        with LargestOutput() as mode:
            noun_mass(query, key, queries, sets, backend=backend).sum().backward()
        largest[backend] = mode.numel
    assert largest["torch"] <= max(query.numel(), row_groups._CHUNK_SCORES_CPU) < num_heads * num_rows * length / 2
    assert largest["eager"] >= num_heads * num_rows * length


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_only_the_gradient_asked_for_is_computed(wanted):
    query, key, queries, sets, grad = make_inputs("group of 7")
    expected = dict(zip(("query", "key"), run(query, key, queries, sets, grad, backend="torch")[1:], strict=True))
    leaves = {"query": query.detach(), "key": key.detach()}
    leaves[wanted].requires_grad_()
    masses = noun_mass(leaves["query"], leaves["key"], queries, sets, backend="torch")
    gradients = masses.grad_fn.apply(grad)
    assert torch.equal(gradients[("query", "key").index(wanted)], expected[wanted])
    assert sum(g is not None for g in gradients) == 1
    assert not noun_mass(query.detach(), key.detach(), queries, sets, backend="torch").requires_grad


def test_gradient_keeps_the_strides_of_the_query():
    inputs = make_inputs("plain", layouts=("transposed", "transposed"))
    _, grad_query, grad_key = run(*inputs, backend="torch")
    assert grad_query.stride() == inputs[0].stride() and grad_key.stride() == inputs[1].stride()


def test_second_derivative_is_refused():
    query, key, queries, sets, _ = make_inputs("plain")
    masses = noun_mass(query, key, queries, sets, backend="torch")
    (grad,) = torch.autograd.grad(masses.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_reentrant_checkpointing(backend):
    query, key, queries, sets, grad = make_inputs("group of 7")
    expected = run(query, key, queries, sets, grad, backend=backend)
    masses = checkpoint(lambda q, k: noun_mass(q, k, queries, sets, backend=backend), query, key, use_reentrant=False)
    for a, e in zip((masses, *torch.autograd.grad(masses, (query, key), grad)), expected, strict=True):
        assert torch.equal(a, e)


def test_autocast_does_not_lower_the_precision():
    inputs = make_inputs("group of 7", torch.float32)
    expected = run(*inputs, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(*inputs, backend="torch")
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["packed neighbours, rows in any order", "softmax over blocks, one a patch"])
def test_values_are_never_read_back_from_a_device(case, backend):
    """Meta tensors have no values: any read-back, size that depends on values or boolean index raises."""
    query, key, queries, sets, _ = make_inputs(case, torch.bfloat16)
    query, key = (t.detach().to("meta").requires_grad_() for t in (query, key))
    masses = noun_mass(query, key, queries.to("meta"), sets.to("meta"), backend=backend)
    assert masses.shape == (len(queries), query.shape[1], sets.shape[1]) and masses.dtype == torch.float32
    masses.sum().backward()
    assert query.grad.shape == query.shape and key.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "sets, error, message",
    [
        ([[[1]]], TypeError, r"sets must be a tensor \[G, S, M\], got list"),
        (torch.ones(1, 1, 2), TypeError, "sets must be int32 or int64, got torch.float32"),
        (torch.tensor([[1, 2]]), ValueError, r"sets must be \[G, S, M\], got shape \[1, 2\]"),
        (
            torch.tensor([[[1]], [[2]]]),
            ValueError,
            r"sets has 2 groups, queries.key_sets 1: key_set picks a row of both",
        ),
        (torch.tensor([[[1]]], device="meta"), ValueError, "sets is on meta, queries on cpu"),
        (
            torch.tensor([[[1, -1], [3, 37]]]),
            ValueError,
            r"sets\[0, 1, 1\] = 37 is neither in \[0, 37\) nor the padding -1",
        ),
        (torch.tensor([[[1, -2]]]), ValueError, r"sets\[0, 0, 1\] = -2 is neither in \[0, 37\) nor the padding -1"),
    ],
)
def test_refused(sets, error, message):
    query, key, queries, *_ = make_inputs("plain")
    with pytest.raises(error, match=message):
        noun_mass(query, key, queries, sets, backend="torch")


def test_arguments_are_checked_as_those_of_noun_attention():
    query, key, queries, sets, _ = make_inputs("plain")
    with pytest.raises(ValueError, match="query and key differ in length"):
        noun_mass(query, key[:, :, 1:], queries, sets)
    with pytest.raises(ValueError, match="unknown noun mass backend 'flash'"):
        noun_mass(query, key, queries, sets, backend="flash")
