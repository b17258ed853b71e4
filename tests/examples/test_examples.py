"""Every example runs, and shows what it says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", ["auto", "eager", "torch"])
def test_kernel_alone(backend, capsys):
    errors = load("kernel_alone").main(backend)
    assert max(errors.values()) < 1e-5 and set(errors) == {"maps", "gradient in query", "gradient in key"}
    assert capsys.readouterr().out.count("error") == 3


def test_kernel_alone_in_triton():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "examples/kernel_alone.py", "triton"]
    out = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert all(float(line.split()[-1]) < 1e-5 for line in out.splitlines() if "error" in line) and "maps" in out


def test_own_loss():
    losses = load("own_loss").main()
    assert losses[-1] < losses[0] / 2


def test_new_family():
    """As a command, since it registers the family in its process."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    out = subprocess.check_output([sys.executable, "examples/new_family.py"], cwd=ROOT, env=environment, text=True)
    assert "tokens of the noun: [" in out and 0 < float(out.split()[-1]) < 10
