"""grid_metrics against a loop in float64, in its limits, and what it refuses."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from swim_kernels import grid_metrics
from tests.kernels.grid_metrics_cases import EMPTY, judge, make_metrics_inputs
from tests.kernels.grid_prediction_cases import BACKENDS, CASES, DTYPES
from tests.kernels.test_grid_pairs import make_pairs

dispatch = importlib.import_module("swim_kernels.grid_prediction.api")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fusion = pytest.mark.parametrize("fusion", ["product", "mean", "add", "none"])


@each_backend
@each_fusion
@pytest.mark.parametrize("case", [case for case in CASES if case != "zeros"])  # products of float64's floor underflow
def test_formulas(case, fusion, backend):
    inputs = make_metrics_inputs(case, fusion)
    expected = judge(*inputs, fusion)
    actual = grid_metrics(*inputs, fusion=fusion, backend=backend)
    assert actual.dtype == torch.float64 and not actual[:, EMPTY].any() and (actual[..., 3].sum(1) > 3).all()
    torch.testing.assert_close(actual, expected, rtol=1e-8 if case == "nearly flat" else 1e-10, atol=1e-14)


@each_fusion
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_eager_in_single_precision(case, fusion, dtype):
    """On a nearly flat frame one rounding of f is 1e-7 / 1e-4 of its spread."""
    for seed in range(3):
        inputs = make_metrics_inputs(case, fusion, dtype, seed)
        actual = grid_metrics(*inputs, fusion=fusion, backend="eager")
        assert actual.dtype == torch.float32
        tolerance = 1e-2 if case == "nearly flat" else 1e-5
        torch.testing.assert_close(actual.double(), judge(*inputs, fusion), rtol=tolerance, atol=tolerance)


@each_backend
def test_by_hand(backend):
    """f = (1, 2, 3, 5) / 10, p = (0, 1/4, 1/2, 1), m = (1, 0, 1/2, 1)."""
    layers, pairs = [torch.tensor([[0.1, 0.2, 0.3, 0.5]], dtype=torch.float64)], make_pairs([(0, 0, 2, 2, 0)])
    shares, centres = torch.tensor([1, 0, 0.5, 1], dtype=torch.float64), torch.tensor([True, False, False, True])
    expected = torch.tensor([[[1, 7.5 / 11, 1.25 / 3, 1]]], dtype=torch.float64)
    torch.testing.assert_close(grid_metrics(layers, pairs, shares, centres, backend=backend), expected)


@each_backend
@each_fusion
def test_ties_share_the_hit(fusion, backend):
    layers = [torch.tensor([[0.125, 0.5, 0.25, 0.5, 0.125, 0.5]]) * factor for factor in (1.0, 0.5)]
    shares = torch.full((6,), 0.5)
    centres = torch.tensor([1.0, 1, 1, 0, 1, 1])
    metrics = grid_metrics(layers, make_pairs([(0, 0, 2, 3, 0)]), shares, centres, fusion=fusion, backend=backend)
    torch.testing.assert_close(metrics[..., 0], torch.full((2 if fusion == "none" else 1, 1), 2 / 3))


@each_backend
@each_fusion
def test_constant_patches(fusion, backend):
    """They point anywhere and overlap nothing; a single cell is one."""
    pairs = make_pairs([(0, 0, 2, 3, 0), (1, 2, 1, 1, 0)])
    shares, centres = torch.tensor([1, 0, 0.5, 0, 0, 0, 1]), torch.tensor([1.0, 0, 1, 0, 0, 0, 1])
    for value in (0.0, 1e-40, 0.03, 1.0):
        layers = [torch.full((2, 7), value) for _ in range(2)]
        metrics = grid_metrics(layers, pairs, shares, centres, fusion=fusion, backend=backend)
        expected = torch.tensor([[1 / 3, 1 / 4, 0, 1], [1, 1, 0, 1]])
        torch.testing.assert_close(metrics, expected.expand_as(metrics))


@each_backend
@each_fusion
def test_not_a_number_is_not_hidden(fusion, backend):
    layers, pairs, shares, centres = make_metrics_inputs("softmaxes", fusion, torch.float32)
    clean = grid_metrics(layers, pairs, shares, centres, fusion=fusion, backend=backend)
    for pair, value in ((3, math.nan), (3, math.inf), (EMPTY, math.nan)):
        row, start = pairs.table[pair, :2].tolist()
        spoiled = [layer.clone() for layer in layers]
        spoiled[1][row, start + 11] = value
        metrics = grid_metrics(spoiled, pairs, shares, centres, fusion=fusion, backend=backend)
        expected = clean.clone()
        if pair != EMPTY:
            expected[1 if fusion == "none" else 0, pair, :3] = math.nan
        torch.testing.assert_close(metrics, expected, rtol=0, atol=0, equal_nan=True)


@each_backend
@pytest.mark.parametrize("fusion, layers", [("mean", 1), ("none", 3)])
def test_no_pair_and_no_graph(fusion, layers, backend):
    nothing, maps = torch.empty(0), [torch.rand(2, 7, requires_grad=True) for _ in range(3)]
    assert grid_metrics(maps, make_pairs([]), nothing, nothing, fusion=fusion).shape == (layers, 0, 4)
    pairs, ones = make_pairs([(0, 0, 2, 3, 0)]), torch.ones(6, requires_grad=True)
    assert not grid_metrics(maps, pairs, ones, ones, fusion=fusion, backend=backend).requires_grad


@each_backend
def test_autocast_changes_nothing(backend):
    inputs = make_metrics_inputs("softmaxes", "product", torch.bfloat16)
    expected = grid_metrics(*inputs, fusion="product", backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(grid_metrics(*inputs, fusion="product", backend=backend), expected)


@each_backend
@each_fusion
def test_values_are_never_read_back_from_a_device(fusion, backend):
    layers, pairs, shares, centres = make_metrics_inputs("shared columns", fusion)
    layers = [layer.to("meta") for layer in layers]
    metrics = grid_metrics(
        layers, pairs.to("meta"), shares.to("meta"), centres.to("meta"), fusion=fusion, backend=backend
    )
    assert metrics.shape == (len(layers) if fusion == "none" else 1, len(pairs), 4)


def arguments(**changes):
    pairs = make_pairs([(0, 0, 2, 3, 0), (1, 6, 2, 3, 0)])
    cells = {"shares": torch.rand(12), "centres": torch.ones(12).bool()}
    return {"maps": [torch.rand(2, 12), torch.rand(2, 12)], "pairs": pairs, **cells, "backend": "torch"} | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"maps": []}, ValueError, r"no attention map: at least one layer's \[R, N\] is needed"),
        ({"pairs": None}, TypeError, "pairs must be GridPairs, got NoneType"),
        ({"fusion": "sum"}, ValueError, "unknown fusion 'sum': choose one of mean, add, product, none"),
        ({"backend": "cuda"}, ValueError, "unknown grid metrics backend 'cuda': choose one of auto, eager, torch, tri"),
        ({"pairs": make_pairs([(0, 0, 2, 3, 0), (1, 7, 2, 3, 0)])}, IndexError, r"pair 1 reads columns \[7, 13\) of"),
        ({"shares": [1.0]}, TypeError, r"shares must be a tensor \[M\], got list"),
        ({"shares": torch.ones(12).bool()}, TypeError, "shares must be bfloat16, float16, float32 or float64, got"),
        ({"centres": torch.ones(12).long()}, TypeError, "centres must be bfloat16, .* got torch.int64"),
        ({"shares": torch.rand(11)}, ValueError, r"shares must be \[12\] on cpu, one for each cell of the pairs, got"),
        ({"centres": torch.rand(12, device="meta")}, ValueError, r"centres must be \[12\] on cpu, .* \[12\] on meta"),
        ({"backend": "triton", "maps": [torch.rand(2, 12).double()]}, RuntimeError, "'triton' is not available"),
    ],
)
def test_refused(changes, error, message):
    grid_metrics(**arguments())
    with pytest.raises(error, match=message):
        grid_metrics(**arguments(**changes))


def test_every_available_backend_is_reached(monkeypatch):
    for name in BACKENDS:
        called = []
        function = dispatch.METRICS_OP.get_function(name)
        monkeypatch.setattr(dispatch.METRICS_OP, name, lambda *a, f=function, c=called: c.append(1) or f(*a))
        grid_metrics(**arguments(backend=name))
        assert called == [1]


def test_default_is_the_mean_on_the_backend_of_the_device():
    given = arguments()
    default = grid_metrics(*(given[name] for name in ("maps", "pairs", "shares", "centres")))
    assert torch.equal(default, grid_metrics(**given, fusion="mean"))
    assert not torch.equal(default, grid_metrics(**given, fusion="product"))
