"""grid_prediction in Triton against float64, values and gradients, and as a node of a graph."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.kernels.byte_counter import count_bytes
from swim_kernels.grid_prediction.triton import kernels as triton_kernels
from swim_kernels.structs.grid_pairs import GridPairs
from tests.kernels import device
from tests.kernels.device import on_device, skip_without_memory
from tests.kernels.grid_prediction_cases import (
    CASES,
    FLOOR,
    FUSIONS,
    assert_within_budget,
    check_probability,
    formulas,
    hardly_any_spread,
    make_inputs,
    measures,
    min_max_prediction,
    run,
    sample,
)
from tests.kernels.test_grid_pairs import make_pairs

backend = importlib.import_module("swim_kernels.grid_prediction.triton.launch")

pytestmark = pytest.mark.usefixtures("poisoned")
arithmetic_with_nan = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
each_fusion = pytest.mark.parametrize("fusion", FUSIONS)
F32 = torch.float32


@pytest.fixture
def small_blocks(monkeypatch):
    """Most frames of the cases fit one block, the largest needs two."""
    monkeypatch.setattr(backend, "BLOCK", 32)


# ---- values and gradients ----


@each_fusion
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, fusion, small_blocks):
    assert_within_budget([sample("triton", case, fusion, F32, seed) for seed in range(2)])


@pytest.mark.parametrize("fusion", ["mean", "add", "product", "none"])
@pytest.mark.parametrize("case", CASES)
def test_probability(case, fusion, small_blocks):
    for seed in range(2):
        check_probability("triton", case, fusion, F32, seed)


@arithmetic_with_nan
@pytest.mark.parametrize("fusion", ["mean", "add", "product", "none"])
def test_nan_stays_in_its_cell_of_a_probability(fusion):
    layers = [torch.tensor([[0.1, math.nan, 0.3, 0.2]]), torch.full((1, 4), 0.25)]
    pairs, grad = make_pairs([(0, 0, 2, 2, 0)]), torch.ones(2 if fusion == "none" else 1, 4)
    p, _ = run(layers, pairs, grad, fusion=fusion, prediction="probability", backend="triton")
    assert p[0].isnan().tolist() == [False, True, False, False]


@each_fusion
@pytest.mark.parametrize("num_layers", [2, 7])
def test_frames_larger_than_a_block(num_layers, fusion):
    generator = torch.Generator().manual_seed(1)
    layers = list((torch.randn(num_layers, 2, 2400, generator=generator) * 2).softmax(-1))
    pairs = make_pairs([(0, 1, 33, 35, 0), (1, 1200, 32, 32, 0), (0, 1156, 1, 1025, 0)])
    assert backend.BLOCK == 512 and pairs.disjoint
    grad = torch.randn(num_layers if fusion == "none" else 1, pairs.num_cells, generator=generator)
    results = [run(layers, pairs, grad, fusion=fusion, backend=name) for name in ("triton", "eager")]
    exact = formulas(layers, pairs, grad, fusion, FLOOR)
    assert_within_budget([[measures(result, layers) for result in (*results, exact)]])


def test_hardly_any_spread():
    layers, pairs, grad = hardly_any_spread()
    actual, exact = run(layers, pairs, grad, backend="triton"), formulas(layers, pairs, grad, "product")
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=5e-6, atol=0)


@triton.jit
def expm1_kernel(x, out, size, BLOCK: tl.constexpr):
    cell = tl.arange(0, BLOCK)
    tl.store(out + cell, triton_kernels._expm1(tl.load(x + cell, mask=cell < size, other=0.0)), mask=cell < size)


@arithmetic_with_nan
def test_expm1_keeps_its_digits():
    """Relative error, from numbers that are nearly 0 on, through the border between series and exponential."""
    x = -torch.cat([torch.logspace(-12, 2.3, 3000), torch.linspace(0.9, 1.1, 1000), torch.tensor([0.0, math.inf])])
    x = on_device(x)
    out = torch.empty_like(x)
    expm1_kernel[(1,)](x, out, len(x), BLOCK=4096)
    exact = x.double().expm1()
    assert out[-2] == 0 and out[-1] == -1
    assert ((out - exact) / exact)[x < 0].abs().max() < 3 * torch.finfo(F32).eps
    expm1_kernel[(1,)](on_device(torch.tensor([math.nan])), out, 1, BLOCK=16)
    assert out[0].isnan()


@arithmetic_with_nan
@each_fusion
def test_ties_share_evenly_and_nothing_counts_at_the_extremes(fusion, small_blocks):
    layers = [torch.tensor([[0.125, 0.5, 0.25, 0.5, 0.125, 0.5]]) * factor for factor in (1.0, 0.5)]
    grad = torch.tensor([[math.nan, math.inf, 3.0, -math.inf, 1e30, math.nan]])
    grad = grad.expand(2 if fusion == "none" else 1, 6)
    pairs = make_pairs([(0, 0, 2, 3, 0)])
    p, grad_a = run(layers, pairs, grad, fusion=fusion, backend="triton")
    assert torch.equal(p[:, [0, 1, 3, 4, 5]], torch.tensor([[0.0, 1, 1, 0, 1]]).expand(len(p), 5))
    assert torch.equal(grad_a[..., 0], grad_a[..., 4])
    assert torch.equal(grad_a[..., 1], grad_a[..., 3]) and torch.equal(grad_a[..., 1], grad_a[..., 5])
    for a, e in zip((p, grad_a), run(layers, pairs, grad, fusion=fusion, backend="torch"), strict=True):
        torch.testing.assert_close(a, e)


@arithmetic_with_nan
@each_fusion
def test_constant_frames_are_zero_and_have_no_gradient(fusion, small_blocks):
    pairs = make_pairs([(0, 0, 2, 3, 0), (1, 2, 1, 1, 0)])
    for value in (0.0, 1e-40, 0.03, 1.0):
        layers = [torch.full((2, 7), value) for _ in range(2)]
        grad = torch.full((2 if fusion == "none" else 1, 7), math.inf)
        p, grad_a = run(layers, pairs, grad, fusion=fusion, backend="triton")
        assert not p.any() and not grad_a.any()


@each_fusion
def test_below_the_floor_there_is_no_gradient(fusion, small_blocks):
    layers, pairs, grad = make_inputs("zeros", fusion, F32)
    p, grad_a = run(layers, pairs, 1e6 * grad, fusion=fusion, backend="triton")
    a = torch.stack(layers)
    below = (a.mean(0).expand_as(a) if fusion == "mean" else a) < FLOOR
    assert p.isfinite().all() and grad_a.isfinite().all() and below.any()
    assert (grad_a[below] == 0).all() and (p >= 0).all() and (p <= 1).all()


def test_layers_that_peak_in_different_cells():
    """log f is far below 0 everywhere, also at its maximum; nothing may overflow beyond the frame's end."""
    layers = [torch.full((1, 8), 1e-30) for _ in range(7)]
    for number, layer in enumerate(layers):
        layer[0, number] = 1.0 - 0.1 * number
    pairs = make_pairs([(0, 0, 1, 7, 0)])
    grad = torch.randn(1, 7, generator=torch.Generator().manual_seed(2))
    results = [run(layers, pairs, grad, backend=name) for name in ("triton", "torch")]
    assert all(result[1].isfinite().all() for result in results)
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@arithmetic_with_nan
@each_fusion
def test_not_a_number_is_not_hidden(fusion, small_blocks):
    layers, pairs, grad = make_inputs("softmaxes", fusion, F32)
    clean = run(layers, pairs, grad, fusion=fusion, backend="triton")
    for value in (math.nan, math.inf):
        layers[1] = layers[1].clone()
        layers[1][1, 3 + 11] = value  # of the pair with 6 x 7 cells, which begin at 40
        p, grad_a = run(layers, pairs, grad, fusion=fusion, backend="triton")
        affected = torch.zeros(p.shape, dtype=torch.bool)
        affected[1 if fusion == "none" else 0, 40:82] = True
        assert p[affected].isnan().all() and torch.equal(p[~affected], clean[0][~affected])
        rows = [0, 2, 3, 4]
        assert grad_a[1, 1].isnan().any() and torch.equal(grad_a[:, rows], clean[1][:, rows])


@each_fusion
def test_outside_the_frames_there_is_no_gradient(fusion, small_blocks):
    for case in ("softmaxes", "shared columns"):
        layers, pairs, grad = make_inputs(case, fusion, F32)
        inside = torch.zeros(layers[0].shape, dtype=torch.bool)
        for row, start, h, w, *_ in pairs.table.tolist():
            inside[row, start : start + h * w] = h * w > 1
        _, grad_a = run(layers, pairs, grad, fusion=fusion, backend="triton")
        assert torch.equal(grad_a != 0, inside.expand_as(grad_a))


@each_fusion
def test_no_pair(fusion):
    for shape in ((2, 7), (0, 0)):
        layers = on_device([torch.rand(shape).requires_grad_() for _ in range(3)])
        p = min_max_prediction(layers, on_device(make_pairs([])), fusion=fusion, backend="triton")
        assert p.shape == (3 if fusion == "none" else 1, 0)
        p.sum().backward()
        assert all(torch.equal(layer.grad, torch.zeros_like(layer)) for layer in layers)


# ---- launches, memory, graph ----


@each_fusion
@pytest.mark.parametrize("case", ["softmaxes", "shared columns"])
def test_one_launch_forward_and_one_backward(case, fusion, launches):
    layers, pairs, grad = on_device(make_inputs(case, fusion, F32))
    layers = [layer.requires_grad_() for layer in layers]
    p = min_max_prediction(layers, pairs, fusion=fusion, backend="triton")
    grid = (len(pairs), 3 if fusion == "none" else 1)
    assert [launch[:2] for launch in launches] == [("prediction", grid)]
    p.backward(grad.float())
    assert [launch[:2] for launch in launches[1:]] == [("gradient", grid)]
    grad_maps = launches[1].arguments["grad_maps"]
    assert grad_maps.shape == ((3, *layers[0].shape) if pairs.disjoint else (3, pairs.num_cells))
    assert launches[1].arguments["DENSE"] is pairs.disjoint


COMPILED = ("num_warps", "num_stages")


def test_options_do_not_depend_on_lengths(launches):
    """What is compiled in stays the same for other videos."""
    options = []
    for columns, size in ((40, (3, 4)), (170, (9, 7))):
        pairs = make_pairs([(0, 2, *size, 0), (1, 5, *size, 0)])
        layers = [torch.rand(3, columns) for _ in range(2)]
        run(layers, pairs, torch.ones(1, pairs.num_cells), backend="triton")
        options.append(
            [{n: v for n, v in launch.arguments.items() if n.isupper() or n in COMPILED} for launch in launches]
        )
        launches.clear()
    assert options[0] == options[1] and len(options[0]) == 2


def test_layers_of_one_layout_are_not_copied(launches):
    memory = on_device(torch.rand(3, 5, 60))
    layers = [layer.requires_grad_() for layer in memory[..., ::2]]  # slices of a larger tensor
    pairs = on_device(make_pairs([(0, 3, 2, 5, 0), (4, 1, 5, 5, 0)]))
    min_max_prediction(layers, pairs, backend="triton")
    assert [layer.data_ptr() for layer in launches[0].arguments["maps"]] == [layer.data_ptr() for layer in layers]
    assert launches[0].arguments["column_stride"] == layers[0].stride(1) == 2
    assert launches[0].arguments["row_stride"] == layers[0].stride(0)


@each_fusion
@pytest.mark.parametrize("case", ["softmaxes", "shared columns"])
def test_bitwise_repeatable(case, fusion, small_blocks):
    inputs = make_inputs(case, fusion, F32)
    first = run(*inputs, fusion=fusion, backend="triton")
    for _ in range(1 if device.DEVICE.type == "cpu" else 3):
        for a, e in zip(run(*inputs, fusion=fusion, backend="triton"), first, strict=True):
            assert torch.equal(a, e)


@each_fusion
def test_pairs_do_not_depend_on_their_neighbours(fusion):
    """Same bits in any order and whether or not the pairs are known to be disjoint."""
    layers, pairs, grad = make_inputs("softmaxes", fusion, F32)
    p, grad_a = run(layers, pairs, grad, fusion=fusion, backend="triton")
    unknown = GridPairs(pairs.table, pairs.sizes, disjoint=False)
    assert torch.equal(run(layers, unknown, grad, fusion=fusion, backend="triton")[1], grad_a)
    rows = [(row, start, h, w, mask) for row, start, h, w, _, mask, *_ in pairs.table.tolist()]
    cells = [torch.arange(first, first + h * w) for _, _, h, w, first, *_ in pairs.table.tolist()]
    order = torch.cat(cells[::-1])
    backwards = run(layers, make_pairs(rows[::-1]), grad[:, order], fusion=fusion, backend="triton")
    assert torch.equal(backwards[0], p[:, order]) and torch.equal(backwards[1], grad_a)


@each_fusion
def test_nothing_is_kept_but_the_maps(fusion):
    layers, pairs, _ = on_device(make_inputs("shared columns", fusion, F32))  # every layer of another layout
    layers = [layer.requires_grad_() for layer in layers]
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        min_max_prediction(layers, pairs, fusion=fusion, backend="triton")
    allowed = {tensor.untyped_storage().data_ptr() for tensor in (*layers, pairs.table)}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == allowed and len(kept) == len(layers) + 1


@each_fusion
def test_some_layers_need_no_gradient(fusion):
    layers, pairs, grad = on_device(make_inputs("softmaxes", fusion, F32))
    _, expected = run(layers, pairs, grad, fusion=fusion, backend="triton")
    layers[1].requires_grad_()
    p = min_max_prediction(layers, pairs, fusion=fusion, backend="triton")
    assert torch.equal(torch.autograd.grad(p, layers[1], grad.float())[0], expected[1])
    assert not min_max_prediction([t.detach() for t in layers], pairs, fusion=fusion, backend="triton").requires_grad


def test_gradient_of_any_strides():
    layers, pairs, _ = make_inputs("softmaxes", "none", F32)
    expected = run(layers, pairs, torch.ones(3, pairs.num_cells), fusion="none", backend="triton")
    for grad in (torch.ones(()).expand(3, pairs.num_cells), torch.ones(pairs.num_cells, 3).t()):
        assert torch.equal(run(layers, pairs, grad, fusion="none", backend="triton")[1], expected[1])


def test_second_derivative_is_refused():
    layers, pairs, _ = on_device(make_inputs("softmaxes", "product", F32))
    layers = [layer.requires_grad_() for layer in layers]
    p = min_max_prediction(layers, pairs, backend="triton")
    (grad,) = torch.autograd.grad(p.square().sum(), layers[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_non_reentrant_checkpointing_and_autocast():
    layers, pairs, grad = on_device(make_inputs("softmaxes", "product", F32))
    expected = run(layers, pairs, grad, backend="triton")
    layers = [layer.requires_grad_() for layer in layers]
    with torch.autocast(device.DEVICE.type, dtype=torch.bfloat16):
        p = checkpoint(lambda *maps: min_max_prediction(maps, pairs, backend="triton"), *layers, use_reentrant=False)
        gradients = torch.autograd.grad(p, layers, grad.float())
    assert torch.equal(p, expected[0]) and torch.equal(torch.stack(gradients), expected[1])


def test_float32_only():
    for dtype in (torch.float64, torch.bfloat16):
        layers, pairs, _ = on_device(make_inputs("softmaxes", "product", dtype))
        with pytest.raises(RuntimeError, match="it takes float32 maps"):
            min_max_prediction(layers, pairs, backend="triton")


def test_offsets_beyond_32_bits():
    """The last row is more than 2³¹ elements away. Memory is reserved, and used only where the maps are."""
    torch.use_deterministic_algorithms(False)  # it would fill all of it
    skip_without_memory(60)
    layers, _, _ = make_inputs("softmaxes", "mean", F32)
    pairs = make_pairs([(4, 20, 4, 5, 0), (0, 0, 3, 7, 0)])
    grad = torch.randn(1, pairs.num_cells, generator=torch.Generator().manual_seed(6))
    layers, pairs, grad = on_device((layers, pairs, grad))
    expected = run(layers, pairs, grad, fusion="mean", backend="triton")
    num_rows, num_columns = layers[0].shape
    step = 2**29 + 64

    def far(layer):
        buffer = torch.empty((num_rows - 1) * step + num_columns, device=layer.device)
        return buffer.as_strided(layer.shape, (step, 1)).copy_(layer)

    layers = [far(layer) for layer in layers]
    assert step < 2**31 < (num_rows - 1) * step
    assert torch.equal(backend.predict(layers, pairs, "mean", "min_max"), expected[0])
    assert torch.equal(torch.stack(backend.gradients(grad, layers, pairs, "mean", "min_max")), expected[1])


@pytest.mark.interpreter
def test_bytes():
    """Maps read twice in forward and three times in backward; p and the gradient written, nothing of another size."""
    layers, pairs, grad = make_inputs("softmaxes", "product", F32)
    pairs = make_pairs([(0, 0, 4, 5, 0), (2, 3, 3, 4, 0)])
    layers = [layer.detach().requires_grad_() for layer in layers]
    grad = torch.randn(1, pairs.num_cells)
    with count_bytes() as forward:
        p = min_max_prediction(layers, pairs, backend="triton")
    with count_bytes() as backward:
        torch.autograd.grad(p, layers, grad)
    cells = pairs.num_cells * 4
    for layer in range(len(layers)):
        for traffic, times in ((forward, 2), (backward, 3)):
            read = traffic.total(tensor=f"maps[{layer}]", access="load")
            assert read.unique == cells and read.issued == times * cells
    assert forward.total(tensor="p", access="store").unique == cells
    written = backward.total(kernel="gradient_kernel", tensor="grad_maps", access="store")
    assert written.unique == len(layers) * cells
    fills = [row for row in backward.rows() if row.kernel.startswith("torch.")]
    assert max(row.unique for row in fills) == len(layers) * layers[0].numel() * 4  # zeros outside the frames
