"""Tests of the Triton kernels: in Triton's interpreter, in a process of their own, or compiled on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_interpreter
    python -m pytest --device cuda tests/kernels/triton_interpreter

The variable is read when kernels are defined, and a process that has it cannot compile: `make test` runs both.
"""

import importlib
import os
from typing import NamedTuple

import numpy as np
import pytest
import torch

from swim_kernels.runtime.backends import find_triton_obstacle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(config):
    on_gpu = config.getoption("--device") == "cuda"
    if on_gpu and INTERPRETED:
        raise pytest.UsageError("--device cuda compiles the kernels: unset TRITON_INTERPRET")
    obstacle = find_triton_obstacle("cpu") if INTERPRETED else None
    if obstacle:
        raise pytest.UsageError(obstacle)
    return True if not on_gpu and not INTERPRETED else None


@pytest.fixture(autouse=True)
def products_rounded_once(monkeypatch):
    """Sum the products of `tl.dot` in float64.

    The interpreter multiplies tiles with numpy, whose BLAS sums a row in an order that differs between processors and,
    on some, between the rows of a tile; a tensor core's does neither.
    """
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *precision):
        product = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def poisoned():
    """Freshly allocated memory is filled with NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # some operations have no such way on a GPU
    assert torch.empty(9).isnan().all() and torch.ones(2).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Launch(NamedTuple):
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, object]


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched so far, in order; `clear()` forgets them."""
    from swim_kernels.runtime.launch import launch

    seen: list[Launch] = []

    def recorded(kernel, grid, **arguments):
        seen.append(Launch(kernel.fn.__name__.removesuffix("_kernel"), grid, arguments))
        launch(kernel, grid, **arguments)

    for op in ("attention_rows", "grid_prediction", "mask_bce"):
        monkeypatch.setattr(importlib.import_module(f"swim_kernels.{op}.triton.launch"), "launch", recorded)
    return seen
