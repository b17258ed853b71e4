"""Mask BCE against the formulas and against float64, values and gradients; what it keeps, refuses and chooses."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch

from benchmarks.memory import count_allocations
from swim_kernels.mask_bce import mask_bce
from swim_kernels.runtime import backends, numerics
from swim_kernels.structs.packed_masks import PackedMasks
from tests.kernels import budget
from tests.kernels.mask_bce_cases import (
    BACKENDS,
    CASES,
    chunked,
    dispatch,
    formulas,
    make_inputs,
    make_masks,
    make_pairs,
    run,
)

MANY = "grids and masks of many sizes, one unused"


assert_within_budget = functools.partial(budget.assert_within_budget, names=("losses", "∂cells"))


@pytest.fixture(autouse=True)
def one_thread():
    """For tensors as small as these, several cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[None, 1, 100], ids=["default chunks", "one row a chunk", "small chunks"])
def chunks(request, monkeypatch):
    """The default has whole masks of these sizes in a chunk, and so many cell rows that they are matrix products."""
    if request.param:
        monkeypatch.setattr(chunked, "_CHUNK_PIXELS_CPU", request.param)
        monkeypatch.setattr(chunked, "_LOGARITHMS", 3 * request.param)
        monkeypatch.setattr(chunked, "_most_frames", lambda grid, mask: 2)


@pytest.mark.parametrize("saturated", [False, True], ids=["inside", "saturated"])
@pytest.mark.parametrize("case", CASES)
def test_torch_against_formulas(case, saturated, chunks):
    inputs = make_inputs(case, num_sets=3, saturated=saturated)
    actual = run(*inputs, backend="torch")
    for a, e in zip(actual, formulas(*inputs), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_eager_against_formulas(case):
    """At 0 and 1 less exactly: eager, which rounds the positions of the pixels, may see 1 - 1e-16 for 1."""
    inputs = make_inputs(case, num_sets=2, saturated=False)
    actual = run(*inputs, backend="eager")
    for a, e in zip(actual, formulas(*inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)
    inputs = make_inputs(case, num_sets=2)
    for a, e in zip(run(*inputs, backend="eager"), formulas(*inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_against_float64(case, dtype, chunks):
    samples = []
    for seed, layout in enumerate(("contiguous", "transposed", "sliced", "contiguous")):
        inputs = make_inputs(case, dtype, num_sets=2, seed=seed, layout=layout)
        eager, actual = (run(*inputs, backend=backend) for backend in BACKENDS)
        samples.append((actual, eager, formulas(*inputs)))
    assert_within_budget(samples)


def test_products_of_fewer_bits_are_not_used(monkeypatch):
    """Where fp32 products may be TF32 or bf16 ones, they are made in float64."""
    assert numerics._has_ieee_products(torch.device("cpu")) and not numerics._has_ieee_products(torch.device("cuda"))
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            assert not numerics._has_ieee_products(torch.device("cpu"))
        finally:
            torch.set_float32_matmul_precision("highest")
    matmul = torch.Tensor.__matmul__

    def rounded(a, b):
        return matmul(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else matmul(a, b)

    monkeypatch.setattr(chunked, "_FEW_ROWS", 0)
    inputs = make_inputs(MANY, torch.float32, saturated=False)
    exact = formulas(*inputs)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    eager, wrong = (run(*inputs, backend=backend) for backend in BACKENDS)
    with pytest.raises(AssertionError, match="above the budget"):
        assert_within_budget([(wrong, eager, exact)])
    monkeypatch.setattr(numerics, "_has_ieee_products", lambda device: False)
    assert_within_budget([(run(*inputs, backend="torch"), eager, exact)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    cells, pairs, masks, _ = make_inputs(MANY, num_sets=2, saturated=False)

    def op(cells):
        return mask_bce(cells, pairs, masks, backend=backend)

    assert torch.autograd.gradcheck(op, cells.requires_grad_(), fast_mode=True)


def assert_right_and_wrong(backend, dtype):
    """All cells 0 or 1: the upsampled prediction must be exactly 0 or 1 everywhere."""
    masks = PackedMasks.pack([torch.ones(11, 14, dtype=torch.bool), torch.zeros(11, 14, dtype=torch.bool)])
    pairs = make_pairs([(3, 4)] * 4, [0, 1, 0, 1])
    cells = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=dtype).repeat_interleave(12)[None]
    ones = torch.ones(1, 4, dtype=dtype)
    losses, grad = run(cells, pairs, masks, ones, backend=backend)
    expected = torch.tensor([[-math.log1p(-1e-6)] * 2 + [-math.log(1e-6)] * 2], dtype=dtype)
    # near 1 the argument of the logarithm has an absolute error of half a rounding
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=torch.finfo(dtype).eps)
    slopes = torch.tensor([-1.0, 1.0, -1e6, 1e6], dtype=dtype)
    torch.testing.assert_close(grad.view(4, 12).sum(1), slopes, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_predictions_that_are_all_right_or_all_wrong(dtype):
    assert_right_and_wrong("torch", dtype)


def assert_small_losses_keep_their_digits(backend):
    """Predictions near 0, in masks of zeros only and in mixed ones."""
    empty, mixed = torch.zeros(11, 13, dtype=torch.bool), make_masks([(11, 13)])[0]
    generator = torch.Generator().manual_seed(0)
    cells, grad = torch.rand(1, 12, generator=generator), torch.randn(1, 1, generator=generator)
    for scale in (1e-3, 1e-5, 1e-7):
        for mask in (empty, mixed):
            inputs = (cells * scale, make_pairs([(3, 4)], [0]), PackedMasks.pack([mask]), grad)
            eager, actual = (run(*inputs, backend=name) for name in ("eager", backend))
            assert_within_budget([(actual, eager, formulas(*inputs))])


def test_small_losses_keep_their_digits():
    assert_small_losses_keep_their_digits("torch")


def test_eager_does_not_fall_over_a_one_that_was_rounded_up():
    """torch's bilinear weights do sum to more than 1 somewhere."""
    cells = torch.ones(1, 12, dtype=torch.float32)
    upsampled = torch.nn.functional.interpolate(cells.view(1, 1, 3, 4), size=(11, 14), mode="bilinear")
    masks, pairs = PackedMasks.pack([upsampled[0, 0] >= 0]), make_pairs([(3, 4)], [0])
    losses, grad = run(cells, pairs, masks, torch.ones(1, 1), backend="eager")
    assert losses.abs().item() < 2e-6 and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_pair(backend):
    cells, pairs, masks, grad = make_inputs("rows that share masks", torch.float32, num_sets=2)
    losses, gradient = run(cells, pairs, masks, grad, backend=backend)
    cells[1, 12 * 3 + 5] = math.nan
    with_nan, gradient_with_nan = run(cells, pairs, masks, grad, backend=backend)
    assert with_nan.isnan().nonzero().tolist() == [[1, 3]]
    assert torch.equal(with_nan[~with_nan.isnan()], losses[~with_nan.isnan()])
    others = torch.ones_like(cells, dtype=torch.bool)
    others[1, 12 * 3 : 12 * 4] = False
    assert torch.equal(gradient_with_nan[others], gradient[others])


def test_what_gets_no_gradient_passes_none_on():
    """Also where the pair's own gradient is NaN."""
    cells, pairs, masks, grad = make_inputs("rows that share masks", torch.float32)
    cells[0, 12 * 2 + 7] = math.nan
    grad[0, 2] = 0
    _, gradient = run(cells, pairs, masks, grad, backend="torch")
    assert torch.equal(gradient[0, 24:36], torch.zeros(12)) and gradient.isfinite().all()
    assert gradient[0, :24].all() and gradient[0, 36:].all()


@pytest.mark.parametrize("num_pairs, num_sets", [(0, 0), (0, 3), (2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_compare(backend, num_pairs, num_sets):
    masks = make_masks([(5, 6)] if num_pairs else [])
    pairs = make_pairs([(2, 3)] * num_pairs, [0] * num_pairs)
    cells = torch.rand(num_sets, pairs.num_cells, dtype=torch.bfloat16, requires_grad=True)
    losses = mask_bce(cells, pairs, masks, backend=backend)
    assert losses.shape == (num_sets, num_pairs) and losses.dtype == torch.float32
    losses.sum().backward()
    assert cells.grad.shape == cells.shape and cells.grad.dtype == torch.bfloat16


def test_repeatable_bit_for_bit(one_thread, two_threads):
    inputs = make_inputs(MANY, torch.float32, num_sets=2)
    first = run(*inputs, backend="torch")
    for _ in range(3):
        for a, b in zip(run(*inputs, backend="torch"), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    inputs = make_inputs(MANY, torch.float32)
    expected = run(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(*inputs, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_the_gradient_of_the_cells_is_all_that_is_kept():
    cells, pairs, masks, _ = make_inputs(MANY, torch.float32, num_sets=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mask_bce(cells.requires_grad_(), pairs, masks, backend="torch")
    assert [t.shape for t in kept] == [cells.shape, pairs.table.shape]


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    cells, pairs, masks, _ = make_inputs(MANY, torch.float32)
    wanted = []
    compute = chunked.compute_losses
    monkeypatch.setattr(chunked, "compute_losses", lambda *a: wanted.append(a[-1]) or compute(*a))
    plain = mask_bce(cells, pairs, masks, backend="torch")
    with torch.no_grad():
        mask_bce(cells.clone().requires_grad_(), pairs, masks, backend="torch")
    losses = mask_bce(cells.clone().requires_grad_(), pairs, masks, backend="torch")
    assert wanted == [False, False, True]
    assert torch.equal(plain, losses) and losses.requires_grad and not plain.requires_grad


def test_gradients_can_be_asked_for_twice_but_have_none_themselves():
    cells, pairs, masks, grad = make_inputs(MANY)
    losses = mask_bce(cells.requires_grad_(), pairs, masks, backend="torch")
    first, second = (torch.autograd.grad(losses, cells, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(losses, cells, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_is_a_small_part_of_the_upsampled_maps(monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_PIXELS_CPU", 2**12)
    monkeypatch.setattr(chunked, "_LOGARITHMS", 2**14)
    masks, pairs = make_masks([(600, 500)] * 2), make_pairs([(9, 14)] * 16, [0, 1] * 8)
    cells, grad = torch.rand(1, pairs.num_cells), torch.randn(1, 16)
    run(cells, pairs, masks, grad, backend="torch")
    with count_allocations() as allocated:
        run(cells, pairs, masks, grad, backend="torch")
    assert 0 < allocated.peak < 16 * 600 * 500 * 4 / 20


def test_nothing_is_read_back_from_a_device():
    """Meta tensors have nothing to read: the numbers of the masks come along from the CPU."""
    cells, pairs, masks, _ = make_inputs(MANY, torch.float32, num_sets=2)
    cells = cells.to("meta").requires_grad_()
    losses = mask_bce(cells, pairs.to("meta").to("meta"), masks.to("meta"), backend="torch")
    assert losses.shape == (2, len(pairs)) and losses.device.type == "meta"
    losses.sum().backward()
    assert cells.grad.shape == cells.shape


def arguments(**changes):
    cells, pairs, masks, _ = make_inputs("rows that share masks", torch.float32)
    return {"cells": cells, "pairs": pairs, "masks": masks, "backend": "torch"} | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"cells": [1.0]}, TypeError, r"cells must be a tensor \[K, M\], got list"),
        (
            {"cells": torch.ones(1, 60).long()},
            TypeError,
            "cells must be bfloat16, float16, float32 or float64, got torch",
        ),
        ({"cells": torch.ones(60)}, ValueError, r"cells must be \[K, M\] with M = 60 cells, got shape \[60\]"),
        ({"cells": torch.ones(1, 59)}, ValueError, r"cells must be \[K, M\] with M = 60 cells, got shape \[1, 59\]"),
        ({"pairs": (1, 2)}, TypeError, "pairs must be GridPairs, got tuple"),
        (
            {"masks": [torch.ones(2, 2)]},
            TypeError,
            r"masks must be PackedMasks, got list: use PackedMasks.pack\(",
        ),
        (
            {"pairs": arguments()["pairs"].to("meta")},
            ValueError,
            r"cells are on cpu, pairs on meta: move them with pairs.to\(device\)",
        ),
        (
            {"masks": arguments()["masks"].to("meta")},
            ValueError,
            r"cells are on cpu, masks on meta: move them with masks.to\(device\)",
        ),
        ({"masks": PackedMasks.pack([])}, ValueError, "5 pairs, but no mask"),
        ({"masks": make_masks([(3, 4)])}, ValueError, "pair 0 asks for mask 1 of 1"),
        ({"pairs": make_pairs([(3, 4)] * 5, [1, 0, 1, -1, 0])}, ValueError, "pair 3 asks for mask -1 of 2"),
        ({"backend": "cuda"}, ValueError, "unknown mask BCE backend 'cuda': choose one of auto, eager, torch, triton"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        mask_bce(**arguments(**changes))


def test_table_of_another_kind():
    pairs = arguments()["pairs"]
    for table in (pairs.table.long(), pairs.table[:4], pairs.table[:, :6]):
        with pytest.raises(ValueError, match=r"pairs.table must be int32 \[P, 8\] for 5 pairs, got torch.int"):
            mask_bce(**arguments(pairs=type(pairs)(table, pairs.sizes)))


@pytest.fixture
def fresh_choice():
    """The reasons are found once per process."""
    backends.find_triton_obstacle.cache_clear()
    yield
    backends.find_triton_obstacle.cache_clear()


@pytest.mark.parametrize(
    "interpreted, dtype, reason",
    [
        (False, torch.float32, "it needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 in the environment"),
        (True, torch.float64, "it has no float64"),
    ],
)
def test_triton_says_why_it_is_not_available(interpreted, dtype, reason, monkeypatch, fresh_choice):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    with pytest.raises(RuntimeError, match=f"mask BCE backend 'triton' is not available: {reason}.*; use backend='tor"):
        mask_bce(**arguments(cells=torch.rand(1, 60, dtype=dtype), backend="triton"))


def test_auto(monkeypatch, fresh_choice):
    assert dispatch.OP.choose("auto", "cpu") == "torch"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.OP.choose("auto", "cuda", dtype) == "triton"
    assert dispatch.OP.choose("auto", "cuda", torch.float64) == "torch"
    backends.find_triton_obstacle.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.OP.choose("auto", "cuda") == "torch"


def test_every_available_backend_is_reached(monkeypatch):
    for name in BACKENDS:
        called = []
        function = dispatch.OP.get_function(name)
        monkeypatch.setattr(dispatch.OP, name, lambda *a, f=function, c=called: c.append(1) or f(*a))
        mask_bce(**arguments(backend=name))
        assert called == [1]
