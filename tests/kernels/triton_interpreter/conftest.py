"""Tests of the Triton kernels in Triton's interpreter, in a process of their own.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_interpreter

The variable is read when kernels are defined, and a process that has it cannot compile: `make test` runs both.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def poisoned():
    """Freshly allocated memory is filled with NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all() and torch.ones(2).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """Names and grids of the kernels launched so far; `clear()` forgets them."""
    from tests.kernels.triton_interpreter.cases import backend

    seen = []
    launch = backend._launch

    def recorded(kernel, grid, *arguments, **options):
        seen.append((kernel.fn.__name__.removesuffix("_kernel"), grid))
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(backend, "_launch", recorded)
    return seen
