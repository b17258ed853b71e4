"""grid_prediction against float64 formulas, values and gradients, and what happens in the limits."""

from __future__ import annotations

import math

import pytest
import torch

from swim_kernels.structs.grid_pairs import GridPairs
from tests.kernels.budget import rms
from tests.kernels.grid_prediction_cases import (
    BACKENDS,
    CASES,
    COLUMNS,
    DTYPES,
    FLOOR,
    FUSIONS,
    ROWS,
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", [case for case in CASES if case != "zeros"])  # products of float64's floor underflow
def test_formulas(case, fusion, backend):
    layers, pairs, grad = make_inputs(case, fusion)
    expected = formulas(layers, pairs, grad, fusion)
    actual = run(layers, pairs, grad, fusion=fusion, backend=backend)
    # both lose digits on a nearly flat frame
    rtol = 1e-8 if case == "nearly flat" else 1e-10
    for a, e in zip(measures(actual, layers)[::2], measures(expected, layers)[::2], strict=True):
        assert a.dtype == torch.float64 and a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol * e.abs().max().item() * 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", ["mean", "add", "product", "none"])
@pytest.mark.parametrize("case", CASES)
def test_probability(case, fusion, backend):
    for seed, dtype in enumerate([torch.float64, *DTYPES]):
        check_probability(backend, case, fusion, dtype, seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_of_layers_is_their_mean_once_it_is_normalised(backend):
    layers, pairs, grad = make_inputs("softmaxes", "mean")
    add, mean = (run(layers, pairs, grad, fusion=fusion, backend=backend) for fusion in ("add", "mean"))
    for a, e in zip(add, mean, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", CASES)
def test_torch_against_float64(case, fusion, dtype):
    assert_within_budget([sample("torch", case, fusion, dtype, seed) for seed in range(4)])


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", CASES)
def test_eager_is_accurate_itself(case, fusion):
    """Or the budget would be worth nothing. On a nearly flat frame one rounding of f is 1e-7 / 1e-4 of its spread."""
    samples = [sample("eager", case, fusion, torch.float32, seed) for seed in range(4)]
    roundings = 1e4 if case == "nearly flat" else 20
    for i in (0, 2):
        actual, exact = ([s[which][i].double() for s in samples] for which in (0, 2))
        error = rms([a - x for a, x in zip(actual, exact, strict=True)])
        assert error <= roundings * torch.finfo(torch.float32).eps * rms(exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", ["softmaxes", "shared columns"])
def test_gradcheck(case, fusion, backend):
    """Finite differences; no ties, so that nothing jumps."""
    layers, pairs, _ = make_inputs(case, fusion)
    layers = [layer.contiguous().mul_(50).requires_grad_() for layer in layers]
    assert torch.autograd.gradcheck(
        lambda *layers: min_max_prediction(layers, pairs, fusion=fusion, backend=backend), layers, fast_mode=True
    )


def test_hardly_any_spread():
    """Where f is exact, so are p, 1 − p and their gradients; automatic differentiation loses the latter's digits."""
    layers, pairs, grad = hardly_any_spread()
    p, grad_a = formulas(layers, pairs, grad, "product")
    for backend in BACKENDS:
        actual = run(layers, pairs, grad, backend=backend)
        torch.testing.assert_close(actual[0].double(), p, rtol=2e-6, atol=0)
        if backend != "eager":
            torch.testing.assert_close(actual[1].double(), grad_a, rtol=5e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """f = (1, 2, 3, 5) / 10, G = (7, 1, 2, 9): p = (0, 1/4, 1/2, 1)."""
    layers = [torch.tensor([[0.1, 0.2, 0.3, 0.5]], dtype=torch.float64)]
    grad = torch.tensor([[7.0, 1.0, 2.0, 9.0]], dtype=torch.float64)
    p, grad_a = run(layers, make_pairs([(0, 0, 2, 2, 0)]), grad, backend=backend)
    torch.testing.assert_close(p, torch.tensor([[0, 0.25, 0.5, 1]], dtype=torch.float64))
    # min: −Σ G (1 − p) / 0.4, max: −Σ G p / 0.4, between: G / 0.4
    expected = torch.tensor([[[-1.75, 1.0, 2.0, -1.25]]], dtype=torch.float64) / 0.4
    torch.testing.assert_close(grad_a, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_ties_share_evenly(fusion, backend):
    layers = [torch.tensor([[0.125, 0.5, 0.25, 0.5, 0.125, 0.5]]) * factor for factor in (1.0, 0.5)]
    grad = torch.tensor([[math.nan, math.inf, 3.0, -math.inf, 1e30, math.nan]])  # nothing counts but the third
    grad = grad.expand(2 if fusion == "none" else 1, 6)
    p, grad_a = run(layers, make_pairs([(0, 0, 2, 3, 0)]), grad, fusion=fusion, backend=backend)
    assert torch.equal(p[:, [0, 1, 3, 4, 5]], torch.tensor([[0.0, 1, 1, 0, 1]]).expand(len(p), 5))
    assert (p[:, 2] > 0).all() and (p[:, 2] < 1).all() and grad_a.isfinite().all()
    assert torch.equal(grad_a[..., 0], grad_a[..., 4]) and (grad_a[..., 0] < 0).all()
    assert torch.equal(grad_a[..., 1], grad_a[..., 3]) and torch.equal(grad_a[..., 1], grad_a[..., 5])
    # f scaled changes nothing: Σ a ∂a = 0
    torch.testing.assert_close((grad_a[:, 0] * torch.cat(layers)).sum(1), torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_constant_frames_are_zero_and_have_no_gradient(fusion, backend):
    pairs = make_pairs([(0, 0, 2, 3, 0), (1, 2, 1, 1, 0)])
    for value in (0.0, 1e-40, 0.03, 1.0):
        layers = [torch.full((2, 7), value) for _ in range(2)]
        grad = torch.full((2 if fusion == "none" else 1, 7), math.inf)
        p, grad_a = run(layers, pairs, grad, fusion=fusion, backend=backend)
        assert not p.any() and not grad_a.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_below_the_floor_there_is_no_gradient(fusion, backend):
    """… nor is there one that is not finite, though what arrives is as large as a cross-entropy's slope can be."""
    for seed in range(3):
        layers, pairs, grad = make_inputs("zeros", fusion, torch.float32, seed)
        p, grad_a = run(layers, pairs, 1e6 * grad, fusion=fusion, backend=backend)
        a = torch.stack(layers)
        below = (a.mean(0).expand_as(a) if fusion == "mean" else a) < FLOOR
        assert p.isfinite().all() and grad_a.isfinite().all() and below.any()
        assert (grad_a[below] == 0).all() and (p >= 0).all() and (p <= 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_not_a_number_is_not_hidden(fusion, backend):
    layers, pairs, grad = make_inputs("softmaxes", fusion, torch.float32)
    clean = run(layers, pairs, grad, fusion=fusion, backend=backend)
    layers[1] = layers[1].clone()
    layers[1][1, 3 + 11] = math.nan  # of the pair with 6 x 7 cells, which begin at 40
    p, grad_a = run(layers, pairs, grad, fusion=fusion, backend=backend)
    affected = torch.zeros(p.shape, dtype=torch.bool)
    affected[1 if fusion == "none" else 0, 40:82] = True
    assert p[affected].isnan().all() and torch.equal(p[~affected], clean[0][~affected])
    rows = [0, 2, 3, 4]
    assert grad_a[1, 1].isnan().any() and torch.equal(grad_a[:, rows], clean[1][:, rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_outside_the_frames_there_is_no_gradient(fusion, backend):
    for case in ("softmaxes", "shared columns"):
        layers, pairs, grad = make_inputs(case, fusion)
        inside = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
        for row, start, h, w, *_ in pairs.table.tolist():
            inside[row, start : start + h * w] = h * w > 1
        _, grad_a = run(layers, pairs, grad, fusion=fusion, backend=backend)
        assert torch.equal(grad_a != 0, inside.expand_as(grad_a))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_pairs_that_share_columns_add_up(fusion, backend):
    layers, pairs, grad = make_inputs("shared columns", fusion)
    assert not pairs.disjoint
    p, grad_a = run(layers, pairs, grad, fusion=fusion, backend=backend)
    total = torch.zeros_like(grad_a)
    for number, (row, start, h, w, first, *_) in enumerate(pairs.table.tolist()):
        alone = make_pairs([(row, start, h, w, 0)])
        cells = slice(first, first + h * w)
        one, grad_one = run(layers, alone, grad[:, cells], fusion=fusion, backend=backend)
        assert alone.disjoint and torch.equal(one, p[:, cells]), number
        total += grad_one
    torch.testing.assert_close(grad_a, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kept", [0, 2], ids=["R = 0", "R = 2"])
def test_no_pair(fusion, backend, kept):
    for columns in (7, 0):
        layers = [torch.rand(kept, columns, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        p = min_max_prediction(layers, make_pairs([]), fusion=fusion, backend=backend)
        assert p.shape == (3 if fusion == "none" else 1, 0) and p.dtype == torch.float32
        p.sum().backward()
        for layer in layers:
            assert layer.grad.dtype == layer.dtype and torch.equal(layer.grad, torch.zeros_like(layer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_known_to_be_disjoint(backend):
    """As on an accelerator, where nobody looks: the gradients are added up, to the same."""
    layers, pairs, grad = make_inputs("softmaxes", "product", torch.float32)
    other = GridPairs(pairs.table, pairs.sizes, disjoint=False)
    expected = run(layers, pairs, grad, backend=backend)
    for a, e in zip(run(layers, other, grad, backend=backend), expected, strict=True):
        assert torch.equal(a, e)
