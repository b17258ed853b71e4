"""How noun attention behaves as a node of a graph: repeatable, lean, never waiting for a device."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from swim_kernels import noun_attention
from swim_kernels.attention_rows import row_groups
from tests.kernels.noun_attention_cases import (
    BACKENDS,
    CASES,
    log_sum_exp,
    make_inputs,
    make_queries,
    run,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend, two_threads):
    """Many rows on few tokens and keys named often, large enough for torch to go parallel."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 14, 300, 64, generator=generator)
    key = torch.randn(2, 2, 300, 64, generator=generator)
    rows = [(r % 2, 290 + r % 3, 0, 291 + r % 3, r % 2) for r in range(48)]
    queries = make_queries(rows, torch.randint(0, 250, (2, 900), generator=generator).tolist())
    grad = torch.randn(48, 900, generator=generator)
    first = run(query, key, queries, grad, backend=backend)
    for _ in range(5):
        for a, e in zip(run(query, key, queries, grad, backend=backend), first, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("given_lse", [False, True], ids=["own lse", "given lse"])
def test_what_is_kept(given_lse):
    """Query rows, the key itself (no copy), lse and the metadata; nothing with Hq × R × L elements."""
    query, key, queries, _ = make_inputs("several chunks", layouts=("transposed", "transposed"))
    lse = log_sum_exp(query, key, queries, 1.0) if given_lse else None

    def kept(backend):
        tensors = []
        with saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            noun_attention(query, key, queries, scale=1.0, lse=lse, backend=backend)
        return tensors

    num_rows, num_heads, length = len(queries), query.shape[1], query.shape[2]
    tensors = kept("torch")
    assert [t.shape for t in tensors] == [
        (num_rows, num_heads, query.shape[3]),
        key.shape,
        (num_rows, num_heads),
        *(t.shape for t in queries.tensors()),
    ]
    assert tensors[1].data_ptr() == key.data_ptr()
    assert max(t.numel() for t in kept("eager")) >= num_rows * num_heads * length  # the measure can tell


class LargestOutput(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.numel = max(self.numel, tensor.numel())
        return out


def test_scores_exist_in_chunks_only():
    num_heads, num_rows, length = 12, 16, 4096
    query = torch.randn(1, num_heads, length, 4, requires_grad=True)
    key = torch.randn(1, 2, length, 4, requires_grad=True)
    queries = make_queries([(0, t, 0, t + 1, 0) for t in range(length - num_rows, length)], [range(3000)])
    largest = {}
    for backend in BACKENDS:
        with LargestOutput() as mode:
            maps = noun_attention(query, key, queries, backend=backend)
            maps.sum().backward()
        largest[backend] = mode.numel
    assert largest["torch"] <= max(query.numel(), row_groups._CHUNK_SCORES_CPU) < num_heads * num_rows * length / 2
    assert largest["eager"] >= num_heads * num_rows * length


def test_rows_are_computed_on_their_own_keys_only():
    """Packed neighbours are groups of their own: R rows × L keys would mostly be masked scores."""
    *_, length, _, queries = CASES["packed neighbours, rows in any order"]
    groups = row_groups.group_rows(queries, 1, length)
    assert [(sorted(group.index.tolist()), group.range, group.read) for group in groups] == [
        ([1, 3], (0, 20), (2, 15)),
        ([2], (20, 37), (21, 30)),
        ([0, 4], (38, 60), (40, 50)),
    ]


def test_every_pass_sees_the_same_chunks(small_chunks):
    """A score must have the same bits in lse and in p; chunks without a key that is read out are left out."""
    key = torch.randn(1, 1, 700, 4)
    queries = make_queries([(0, 699, 13, 690, 0)], [range(200, 300)])
    (rows,) = row_groups.group_rows(queries, 1, 700)
    spans = {
        name: [chunk[:2] for chunk in row_groups.key_chunks(key, rows, 2, span, torch.float32)]
        for name, span in (("range", rows.range), ("read", rows.read), ("nothing", (0, 0)))
    }
    assert spans["range"] == [(13, 141), (141, 269), (269, 397), (397, 525), (525, 653), (653, 690)]
    assert spans["read"] == [(141, 269), (269, 397)]
    assert spans["nothing"] == []


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_only_the_gradient_asked_for_is_computed(wanted):
    query, key, queries, grad = make_inputs("group of 7")
    expected = dict(zip(("query", "key"), run(query, key, queries, grad, backend="torch")[1:], strict=True))
    leaves = {"query": query.detach(), "key": key.detach()}
    leaves[wanted].requires_grad_()
    maps = noun_attention(leaves["query"], leaves["key"], queries, backend="torch")
    gradients = maps.grad_fn.apply(grad)
    assert torch.equal(gradients[("query", "key").index(wanted)], expected[wanted])
    assert sum(g is not None for g in gradients) == 1
    assert not noun_attention(query.detach(), key.detach(), queries, backend="torch").requires_grad


def test_gradient_keeps_the_strides_of_the_query():
    query, key, queries, grad = make_inputs("plain", layouts=("transposed", "transposed"))
    _, grad_query, grad_key = run(query, key, queries, grad, backend="torch")
    assert grad_query.stride() == query.stride() and grad_key.stride() == key.stride()


def test_no_gradient_arrives():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, maps):
            return maps.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    query, key, queries, _ = make_inputs("plain")
    Stop.apply(noun_attention(query, key, queries, backend="torch")).sum().backward()
    assert query.grad is None and key.grad is None


def test_second_derivative_is_refused():
    query, key, queries, _ = make_inputs("plain")
    maps = noun_attention(query, key, queries, backend="torch")
    (grad,) = torch.autograd.grad(maps.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_reentrant_checkpointing(backend):
    query, key, queries, grad = make_inputs("group of 7")
    expected = run(query, key, queries, grad, backend=backend)
    maps = checkpoint(lambda q, k: noun_attention(q, k, queries, backend=backend), query, key, use_reentrant=False)
    for a, e in zip((maps, *torch.autograd.grad(maps, (query, key), grad)), expected, strict=True):
        assert torch.equal(a, e)


def test_autocast_does_not_lower_the_precision():
    query, key, queries, grad = make_inputs("group of 7", torch.float32)
    for backend in BACKENDS:
        expected = run(query, key, queries, grad, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = noun_attention(query, key, queries, backend=backend)
            actual = (maps, *torch.autograd.grad(maps, (query, key), grad.float())) if backend == "torch" else (maps,)
        for a, e in zip(actual, expected, strict=False):
            assert torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_never_read_back_from_a_device(backend):
    """Meta tensors have no values: any read-back, size that depends on values or boolean index raises."""
    query, key, queries, _ = make_inputs("packed neighbours, rows in any order", torch.bfloat16)
    query, key = (t.detach().to("meta").requires_grad_() for t in (query, key))
    queries = queries.to("meta")
    maps = noun_attention(query, key, queries, backend=backend)
    assert maps.shape == (len(queries), queries.key_sets.shape[1]) and maps.dtype == torch.float32
    maps.sum().backward()
    assert query.grad.shape == query.shape and key.grad.dtype == torch.bfloat16
