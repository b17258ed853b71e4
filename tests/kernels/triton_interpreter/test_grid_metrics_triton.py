"""grid_metrics in Triton against float64 and the eager reference."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from tests.kernels.budget import assert_within_budget
from tests.kernels.device import on_device
from tests.kernels.grid_metrics_cases import EMPTY, judge, make_metrics_inputs, measure
from tests.kernels.grid_prediction_cases import CASES
from tests.kernels.test_grid_pairs import make_pairs

backend = importlib.import_module("swim_kernels.grid_prediction.triton.launch")

pytestmark = pytest.mark.usefixtures("poisoned")
arithmetic_with_nan = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
each_fusion = pytest.mark.parametrize("fusion", ["product", "mean", "add", "none"])
NAMES = ("hit", "mass", "iou", "count")
F32 = torch.float32


@pytest.fixture
def small_blocks(monkeypatch):
    """Most patches of the cases fit one block, the largest needs two."""
    monkeypatch.setattr(backend, "BLOCK", 32)


def assert_good(samples, fusion):
    results = []
    for inputs in samples:
        actual, eager = (measure(*inputs, fusion=fusion, backend=name) for name in ("triton", "eager"))
        results.append([value.unbind(-1) for value in (actual, eager, judge(*inputs, fusion))])
    assert_within_budget(results, names=NAMES)


@each_fusion
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, fusion, small_blocks):
    samples = [make_metrics_inputs(case, fusion, F32, seed) for seed in range(2)]
    assert_good(samples, fusion)
    for inputs in samples:
        metrics = measure(*inputs, fusion=fusion, backend="triton")
        assert metrics.dtype == F32 and not metrics[:, EMPTY].any()


@each_fusion
def test_patches_larger_than_a_block(fusion):
    generator = torch.Generator().manual_seed(1)
    layers = list((torch.randn(7, 2, 2400, generator=generator) * 2).softmax(-1))
    pairs = make_pairs([(0, 1, 33, 35, 0), (1, 1200, 32, 32, 0), (0, 1156, 1, 1025, 0)])
    shares = torch.rand(pairs.num_cells, generator=generator)
    assert backend.BLOCK == 512
    assert_good([(layers, pairs, shares, shares.round())], fusion)


@arithmetic_with_nan
@each_fusion
def test_ties_and_constant_patches(fusion, small_blocks):
    ties = torch.tensor([[0.125, 0.5, 0.25, 0.5, 0.125, 0.5, 0.03]])
    pairs, centres = make_pairs([(0, 0, 2, 3, 0), (0, 6, 1, 1, 0)]), torch.tensor([1, 1, 1, 0, 1, 1, 1]).bool()
    for layers in ([ties, ties * 0.5], [torch.full((1, 7), 0.03)] * 2, [torch.zeros(1, 7)] * 2):
        for shares in (torch.full((7,), 0.5), torch.zeros(7)):
            inputs = (layers, pairs, shares, centres)
            actual, eager = (measure(*inputs, fusion=fusion, backend=name) for name in ("triton", "eager"))
            torch.testing.assert_close(actual, eager)
            assert torch.equal(actual[..., 0], eager[..., 0])


@arithmetic_with_nan
@each_fusion
def test_not_a_number_is_not_hidden(fusion, small_blocks):
    layers, pairs, shares, centres = make_metrics_inputs("softmaxes", fusion, F32)
    clean = measure(layers, pairs, shares, centres, fusion=fusion, backend="triton")
    for pair, value in ((3, math.nan), (3, math.inf), (EMPTY, math.nan)):
        row, start = pairs.table[pair, :2].tolist()
        spoiled = [layer.clone() for layer in layers]
        spoiled[1][row, start + 11] = value
        metrics = measure(spoiled, pairs, shares, centres, fusion=fusion, backend="triton")
        expected = clean.clone()
        if pair != EMPTY:
            expected[1 if fusion == "none" else 0, pair, :3] = math.nan
        torch.testing.assert_close(metrics, expected, rtol=0, atol=0, equal_nan=True)


@each_fusion
def test_one_launch(fusion, launches):
    inputs = on_device(make_metrics_inputs("softmaxes", fusion, F32))
    metrics = measure(*inputs, fusion=fusion, backend="triton")
    grid = (len(inputs[1]), 3 if fusion == "none" else 1)
    assert [launch[:2] for launch in launches] == [("metrics", grid)]
    assert launches[0].arguments["shares"].data_ptr() == inputs[2].data_ptr(), "fp32 is not copied"
    assert torch.equal(measure(*inputs, fusion=fusion, backend="triton"), metrics)


def test_no_pair():
    nothing, layers = torch.empty(0), [torch.rand(2, 7)] * 3
    for fusion, count in (("mean", 1), ("none", 3)):
        metrics = measure(layers, make_pairs([]), nothing, nothing, fusion=fusion, backend="triton")
        assert metrics.shape == (count, 0, 4)


def test_float32_only():
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match="grid metrics backend 'triton' .* it takes float32 maps"):
            measure(*make_metrics_inputs("softmaxes", "mean", dtype), backend="triton")
