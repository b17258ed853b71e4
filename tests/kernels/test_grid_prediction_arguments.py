"""grid_prediction: what it refuses, which backend it takes."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from swim_kernels.grid_prediction import grid_prediction
from swim_kernels.runtime import backends
from swim_kernels.structs.grid_pairs import GridPairs
from tests.kernels.grid_prediction_cases import BACKENDS
from tests.kernels.test_grid_pairs import make_pairs

dispatch = importlib.import_module("swim_kernels.grid_prediction.api")


def arguments(**changes):
    defaults = {"maps": [torch.rand(2, 12), torch.rand(2, 12)], "pairs": make_pairs([(0, 0, 2, 3, 0), (1, 6, 2, 3, 0)])}
    return defaults | {"backend": "torch"} | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"maps": []}, ValueError, r"no attention map: at least one layer's \[R, N\] is needed"),
        ({"maps": [torch.rand(2, 12), None]}, TypeError, r"maps\[1\] must be a tensor \[R, N\], got NoneType"),
        (
            {"maps": [torch.ones(2, 12).long()]},
            TypeError,
            r"maps\[0\] must be bfloat16, float16, float32 or float64, got torch.int64",
        ),
        (
            {"maps": [torch.rand(2, 12), torch.rand(2, 12).double()]},
            TypeError,
            r"maps\[1\] is torch.float64, maps\[0\] is torch.float32: cast one of them",
        ),
        ({"maps": torch.rand(2, 12)}, ValueError, r"maps\[0\] has shape \[12\]"),
        (
            {"maps": [torch.rand(2, 12), torch.rand(2, 13)]},
            ValueError,
            r"maps\[1\] has shape \[2, 13\], maps\[0\] \[2, 12\]: one \[R, N\] per layer, all of one shape",
        ),
        (
            {"maps": [torch.rand(2, 12), torch.rand(2, 12, device="meta")]},
            ValueError,
            r"maps\[1\] is on meta, maps\[0\] on cpu",
        ),
        (
            {"maps": [torch.rand(2, 12, device="meta")]},
            ValueError,
            r"maps are on meta, pairs on cpu: move them with pairs.to\(device\)",
        ),
        ({"pairs": None}, TypeError, "pairs must be GridPairs, got NoneType"),
        (
            {"pairs": GridPairs(torch.zeros(2, 5, dtype=torch.int32), ((2, 3), (2, 3)))},
            ValueError,
            r"pairs.table must be int32 \[P, 8\] for 2 pairs, got torch.int32 \[2, 5\]",
        ),
        ({"fusion": "sum"}, ValueError, "unknown fusion 'sum': choose one of mean, add, product, none"),
        (
            {"backend": "cuda"},
            ValueError,
            "unknown grid prediction backend 'cuda': choose one of auto, eager, torch, triton",
        ),
        (
            {"pairs": make_pairs([(0, 0, 2, 3, 0), (1, 7, 2, 3, 0)])},
            IndexError,
            r"pair 1 reads columns \[7, 13\) of row 1: outside maps of 2 rows and 12 columns",
        ),
        ({"pairs": make_pairs([(2, 0, 2, 3, 0)])}, IndexError, r"pair 0 reads columns \[0, 6\) of row 2: outside"),
        ({"pairs": make_pairs([(-1, 0, 2, 3, 0)])}, IndexError, r"pair 0 reads columns \[0, 6\) of row -1: outside"),
        ({"pairs": make_pairs([(0, -1, 2, 3, 0)])}, IndexError, r"pair 0 reads columns \[-1, 5\) of row 0: outside"),
        (
            {"maps": [torch.rand(0, 12)]},
            IndexError,
            r"pair 0 reads columns \[0, 6\) of row 0: outside maps of 0 rows and 12 columns",
        ),
    ],
)
def test_refused(changes, error, message):
    grid_prediction(**arguments())
    with pytest.raises(error, match=message):
        grid_prediction(**arguments(**changes))


@pytest.fixture
def fresh_choice():
    """The reasons are found once per process."""
    backends.find_triton_obstacle.cache_clear()
    yield
    backends.find_triton_obstacle.cache_clear()


@pytest.mark.parametrize(
    "environment, dtype, reason",
    [
        (
            {},
            torch.float32,
            "it needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 in the environment, not cpu",
        ),
        ({"TRITON_INTERPRET": "1"}, torch.float64, "it takes float32 maps, not float64"),
        ({"TRITON_INTERPRET": "1"}, torch.bfloat16, "it takes float32 maps, not bfloat16"),
    ],
)
def test_triton_says_why_it_is_not_available(environment, dtype, reason, monkeypatch, fresh_choice):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"backend 'triton' is not available: {reason}; use backend='torch'"):
        grid_prediction(**arguments(maps=[torch.rand(2, 12, dtype=dtype)], backend="triton"))


def test_auto_on_cuda_takes_triton_for_what_it_can(monkeypatch, fresh_choice):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert dispatch.OP.choose("auto", "cuda") == dispatch.OP.choose("triton", "cuda") == "triton"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert dispatch.OP.choose("auto", "cuda", dtype) == "torch"


def test_auto_on_cuda_falls_back_with_the_reason(monkeypatch, fresh_choice):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in dispatch.OP.refuse_triton("cuda", torch.float32)
    assert dispatch.OP.choose("auto", "cuda") == "torch"


def test_every_available_backend_is_reached(monkeypatch):
    """The name decides which function runs, under the name by which it was asked for."""
    for name in BACKENDS:
        called = []
        function = dispatch.OP.get_function(name)
        monkeypatch.setattr(dispatch.OP, name, lambda *a, f=function, c=called: c.append(1) or f(*a), raising=True)
        grid_prediction(**arguments(backend=name))
        assert called == [1]


def test_default_is_the_mean_of_the_probabilities_on_the_backend_of_the_device():
    given = arguments()
    default = grid_prediction(given["maps"], given["pairs"])
    assert torch.equal(default, grid_prediction(**given, fusion="mean", prediction="probability"))
    assert not torch.equal(default, grid_prediction(**given, fusion="product"))
    assert not torch.equal(default, grid_prediction(**given, prediction="min_max"))
