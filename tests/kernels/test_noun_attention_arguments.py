"""noun_attention: what it refuses, which backend it takes, what importing it costs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

import swim_kernels
from swim_kernels import noun_attention
from swim_kernels.runtime import backends
from tests.kernels.noun_attention_cases import make_queries

dispatch = importlib.import_module("swim_kernels.noun_attention.api")


def arguments(**changes):
    defaults = {
        "query": torch.randn(2, 6, 9, 8),
        "key": torch.randn(2, 3, 9, 8),
        "queries": make_queries([(0, 8, 0, 9, 0), (1, 5, 0, 6, 0)], [[1, 2]]),
        "backend": "torch",
    }
    return defaults | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
        ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
        ({"query": torch.randn(6, 9, 8)}, ValueError, r"query must be \[B, Hq, L, D\], got shape \[6, 9, 8\]"),
        ({"key": torch.randn(1, 2, 3, 9, 8)}, ValueError, r"key must be \[B, Hkv, L, D\], got shape \[1, 2, 3, 9, 8\]"),
        ({"queries": (1, 2)}, TypeError, "queries must be a NounQueries, got tuple"),
        (
            {"query": torch.zeros(2, 6, 9, 8, dtype=torch.int64)},
            TypeError,
            "query must be bfloat16, float16, float32 or float64, got torch.int64",
        ),
        (
            {"key": torch.randn(2, 3, 9, 8).bfloat16()},
            TypeError,
            "query is torch.float32, key is torch.bfloat16: cast one of them",
        ),
        ({"key": torch.randn(2, 3, 9, 8, device="meta")}, ValueError, "query is on cpu, key on meta"),
        (
            {"queries": arguments()["queries"].to("meta")},
            ValueError,
            r"query is on cpu, queries on meta: move them with queries.to\(device\)",
        ),
        (
            {"key": torch.randn(1, 3, 9, 8)},
            ValueError,
            r"query and key differ in batch, 2 and 1: shapes \[2, 6, 9, 8\] and \[1, 3, 9, 8\]",
        ),
        ({"key": torch.randn(2, 3, 10, 8)}, ValueError, "query and key differ in length, 9 and 10"),
        ({"key": torch.randn(2, 3, 9, 4)}, ValueError, "query and key differ in head_dim, 8 and 4"),
        ({"key": torch.randn(2, 4, 9, 8)}, ValueError, "6 query heads cannot be shared by 4 key heads"),
        ({"key": torch.randn(2, 0, 9, 8)}, ValueError, r"no heads or no head_dim: query \[2, 6, 9, 8\], key \[2, 0,"),
        ({"scale": torch.tensor(0.1)}, TypeError, "scale must be a Python number, got Tensor"),
        ({"scale": True}, TypeError, "scale must be a Python number, got bool"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"lse": 1.0}, TypeError, r"lse must be a tensor \[R, Hq\], got float"),
        ({"lse": torch.zeros(6, 2)}, ValueError, r"lse must be \[R, Hq\] = \[2, 6\], got shape \[6, 2\]"),
        (
            {"lse": torch.zeros(2, 6).bfloat16()},
            TypeError,
            "lse must be torch.float32 for torch.float32 query and key, got torch.bfloat16",
        ),
        ({"lse": torch.zeros(2, 6, device="meta")}, ValueError, "query is on cpu, lse on meta"),
        (
            {"queries": make_queries([(0, 9, 0, 9, 0)], [[1]])},
            ValueError,
            r"NounQueries, row 0: position 9 is outside \[0, 9\)",
        ),
        ({"queries": make_queries([(2, 8, 0, 9, 0)], [[1]])}, ValueError, r"sequence 2 is outside \[0, 2\)"),
        (
            {"backend": "flash"},
            ValueError,
            "unknown noun attention backend 'flash': choose one of auto, eager, torch, triton",
        ),
    ],
)
def test_refused(changes, error, message):
    noun_attention(**arguments())
    with pytest.raises(error, match=f"{message}"):
        noun_attention(**arguments(**changes))


def test_float64_lse_goes_with_float64_inputs():
    given = arguments(query=torch.randn(2, 6, 9, 8).double(), key=torch.randn(2, 3, 9, 8).double())
    with pytest.raises(TypeError, match="lse must be torch.float64 for torch.float64 query and key, got torch.float32"):
        noun_attention(**given, lse=torch.zeros(2, 6))
    assert noun_attention(**given, lse=torch.zeros(2, 6).double()).dtype == torch.float64


def test_values_are_not_checked_where_that_would_wait_for_a_device():
    queries = make_queries([(7, 99, 3, 2, 5)], [[1000]]).to("meta")
    query, key = torch.randn(2, 6, 9, 8, device="meta"), torch.randn(2, 3, 9, 8, device="meta")
    assert noun_attention(query, key, queries).shape == (1, 1)


def test_default_scale():
    given = arguments()
    assert torch.equal(noun_attention(**given), noun_attention(**given, scale=8**-0.5))


@pytest.fixture
def fresh_choice():
    """The reasons are found once per process."""
    backends.find_triton_obstacle.cache_clear()
    yield
    backends.find_triton_obstacle.cache_clear()


@pytest.mark.parametrize(
    "environment, changes, reason",
    [
        ({}, {}, "it needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 in the environment, not cpu"),
        (
            {"TRITON_INTERPRET": "1"},
            {"query": torch.randn(2, 6, 9, 8).double(), "key": torch.randn(2, 3, 9, 8).double()},
            "it has no float64",
        ),
        (
            {"TRITON_INTERPRET": "1"},
            {"query": torch.randn(2, 6, 9, 257), "key": torch.randn(2, 3, 9, 257)},
            "head_dim 257 is above 256",
        ),
        (
            {"TRITON_INTERPRET": "1"},
            {"query": torch.randn(2, 17, 9, 8), "key": torch.randn(2, 1, 9, 8)},
            "17 query heads share a key head, at most 16 can",
        ),
    ],
)
def test_triton_says_why_it_is_not_available(environment, changes, reason, monkeypatch, fresh_choice):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"backend 'triton' is not available: {reason}; use backend='torch'"):
        noun_attention(**arguments(**changes, backend="triton"))


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.6", True)],
)
def test_the_interpreter_says_which_numpy_it_needs(triton_version, numpy_version, works, monkeypatch, fresh_choice):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)
    reason = "the interpreter of triton 3.6 needs numpy below 2.4, not 2.4.0: pip install 'numpy<2.4'"
    assert backends.find_triton_obstacle("cpu") == (None if works else reason)


@pytest.mark.parametrize(
    "missing, reason",
    [("triton", "triton is not installed"), ("gpu", "torch sees no NVIDIA GPU"), ("new gpu", "compute capability 8.0")],
)
def test_auto_on_cuda_falls_back_with_the_reason(missing, reason, monkeypatch, fresh_choice):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "gpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    if missing == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason in dispatch.OP.refuse_triton("cuda", torch.bfloat16, 7, 128)
    assert dispatch.OP.choose("auto", "cuda") == "torch"


def test_auto_on_cuda_takes_triton_for_what_it_can(monkeypatch, fresh_choice):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert dispatch.OP.choose("auto", "cuda", torch.bfloat16, 7, 128) == "triton"
    assert dispatch.OP.choose("auto", "cuda", torch.float64, 7, 128) == "torch"
    assert dispatch.OP.choose("auto", "cuda", torch.bfloat16, 17, 128) == "torch"
    assert dispatch.OP.choose("auto", "cuda", torch.bfloat16, 7, 257) == "torch"


def test_auto_on_cuda_takes_triton_where_there_is_one(monkeypatch):
    monkeypatch.setattr(dispatch.OP, "refuse_triton", lambda *_: None)
    assert dispatch.OP.choose("auto", "cuda") == "triton"
    assert dispatch.OP.choose("triton", "cuda") == "triton"
    assert dispatch.OP.choose("auto", "cpu") == "torch"


def test_every_available_backend_is_reached(monkeypatch):
    """The name decides which function runs, under the name by which it was asked for."""
    given = arguments()
    for name in ("eager", "torch"):
        called = []
        function = dispatch.OP.get_function(name)
        monkeypatch.setattr(dispatch.OP, name, lambda *a, f=function, c=called: c.append(1) or f(*a), raising=True)
        noun_attention(**given | {"backend": name})
        assert called == [1]


def test_import_is_light():
    """Beyond torch, importing the package loads nothing but itself: no triton, no transformers, no GPU."""
    code = (
        "import sys, torch; before = set(sys.modules); import swim_kernels; "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before})); "
        "print(torch.cuda.is_initialized())"
    )
    path = Path(swim_kernels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(path)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["swim_kernels", "False"]
    assert not (path / "__init__.py").exists()  # it would shadow Hugging Face's package `kernels`
