"""How grid_prediction behaves as a node of a graph: repeatable, lean, never waiting for a device."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.kernels.grid_prediction_cases import (
    BACKENDS,
    FUSIONS,
    MIXED,
    make_inputs,
    min_max_prediction,
    run,
    softmaxes,
)
from tests.kernels.test_grid_pairs import make_pairs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shared", [False, True])
def test_bitwise_repeatable(fusion, backend, shared, two_threads):
    """Large enough for torch to go parallel; every column in several pairs."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(2, 4, 9000, generator=generator)
    starts = range(0, 9000 - 1024, 256 if shared else 1024)
    pairs = make_pairs([(row, start, 32, 32, 0) for start in starts for row in range(4)])
    assert pairs.disjoint is not shared
    grad = torch.randn(2 if fusion == "none" else 1, pairs.num_cells, generator=generator)
    first = run(maps, pairs, grad, fusion=fusion, backend=backend)
    for _ in range(4):
        for a, e in zip(run(maps, pairs, grad, fusion=fusion, backend=backend), first, strict=True):
            assert torch.equal(a, e)


def kept_for_backward(layers, pairs, **options):
    tensors = []
    with saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        min_max_prediction(layers, pairs, **options)
    return tensors


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_kept_but_the_maps(fusion, dtype):
    layers, pairs, _ = make_inputs("shared columns", fusion, dtype)
    layers = [layer.requires_grad_() for layer in layers]
    allowed = {tensor.untyped_storage().data_ptr() for tensor in (*layers, pairs.table)}
    kept = kept_for_backward(layers, pairs, fusion=fusion, backend="torch")
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == allowed and len(kept) == len(layers) + 1
    eager = kept_for_backward(layers, pairs, fusion=fusion, backend="eager")
    assert not {tensor.untyped_storage().data_ptr() for tensor in eager} <= allowed  # the measure can tell


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_may_be_slices_of_one_tensor(backend):
    generator = torch.Generator().manual_seed(5)
    maps = softmaxes(generator).float().requires_grad_()
    grad = torch.randn(1, MIXED.num_cells, generator=generator)
    p = min_max_prediction(maps, MIXED, backend=backend)
    expected = run([layer.detach().clone() for layer in maps], MIXED, grad, backend=backend)
    assert torch.equal(p, expected[0]) and torch.equal(torch.autograd.grad(p, maps, grad)[0], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_for_several_layers(backend):
    layers, pairs, grad = make_inputs("softmaxes", "product")
    layer = layers[0].requires_grad_()
    p = min_max_prediction([layer, layer], pairs, backend=backend)
    expected = run([layer.detach().clone() for _ in range(2)], pairs, grad, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(p, layer, grad)[0], expected[1].sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_some_layers_need_no_gradient(fusion, backend):
    layers, pairs, grad = make_inputs("softmaxes", fusion)
    _, expected = run(layers, pairs, grad, fusion=fusion, backend=backend)
    layers[1].requires_grad_()
    p = min_max_prediction(layers, pairs, fusion=fusion, backend=backend)
    assert torch.equal(torch.autograd.grad(p, layers[1], grad)[0], expected[1])
    assert not min_max_prediction([t.detach() for t in layers], pairs, fusion=fusion, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_any_strides(backend):
    layers, pairs, _ = make_inputs("softmaxes", "none")
    expected = run(layers, pairs, torch.ones(3, pairs.num_cells), fusion="none", backend=backend)
    actual = run(layers, pairs, torch.ones(()).expand(3, pairs.num_cells), fusion="none", backend=backend)
    assert torch.equal(actual[1], expected[1])


def test_gradients_keep_strides_and_dtype():
    layers, pairs, grad = make_inputs("softmaxes", "product", torch.float16, seed=1)
    layers = [layer.requires_grad_() for layer in layers]
    p = min_max_prediction(layers, pairs, backend="torch")
    for layer, grad_a in zip(layers, torch.autograd.grad(p, layers, grad.float()), strict=True):
        assert grad_a.dtype == layer.dtype and grad_a.stride() == torch.zeros_like(layer).stride()


def test_no_gradient_arrives():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p):
            return p.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    layers, pairs, _ = make_inputs("softmaxes", "product")
    layers = [layer.requires_grad_() for layer in layers]
    Stop.apply(min_max_prediction(layers, pairs, backend="torch")).sum().backward()
    assert all(layer.grad is None for layer in layers)


def test_second_derivative_is_refused():
    layers, pairs, _ = make_inputs("softmaxes", "product")
    layers = [layer.requires_grad_() for layer in layers]
    p = min_max_prediction(layers, pairs, backend="torch")
    (grad,) = torch.autograd.grad(p.square().sum(), layers[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_reentrant_checkpointing(backend):
    layers, pairs, grad = make_inputs("softmaxes", "product")
    expected = run(layers, pairs, grad, backend=backend)
    layers = [layer.requires_grad_() for layer in layers]
    p = checkpoint(lambda *maps: min_max_prediction(maps, pairs, backend=backend), *layers, use_reentrant=False)
    assert torch.equal(p, expected[0])
    assert torch.equal(torch.stack(torch.autograd.grad(p, layers, grad)), expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(fusion, backend, dtype):
    layers, pairs, grad = make_inputs("softmaxes", fusion, dtype)
    expected = run(layers, pairs, grad, fusion=fusion, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(layers, pairs, grad, fusion=fusion, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", ["softmaxes", "shared columns"])
def test_values_are_never_read_back_from_a_device(case, fusion, backend):
    """Meta tensors have no values: any read-back, size that depends on values or boolean index raises."""
    layers, pairs, _ = make_inputs(case, fusion, torch.bfloat16)
    layers = [layer.to("meta").requires_grad_() for layer in layers]
    p = min_max_prediction(layers, pairs.to("meta"), fusion=fusion, backend=backend)
    assert p.shape == (len(layers) if fusion == "none" else 1, pairs.num_cells) and p.dtype == torch.float32
    p.sum().backward()
    assert all(layer.grad.shape == layer.shape and layer.grad.dtype == torch.bfloat16 for layer in layers)
