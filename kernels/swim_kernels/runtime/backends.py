"""Dispatch of an op to one of its backends: the same choice, log line and errors for every op."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swim_kernels.runtime.numerics import no_autocast

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "torch", "triton")


@dataclass
class Op:
    """An op and the functions that implement it, all with the same arguments.

    Attributes:
        name: in messages.
        eager, torch: functions.
        import_triton: returns that of the Triton kernels, imported where it is used: `TRITON_INTERPRET` is read when
            kernels are defined.
        refuse: returns why the Triton kernels cannot take inputs with certain properties, None if they can.
    """

    name: str
    eager: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    import_triton: Callable[[], Callable[..., Tensor]]
    refuse: Callable[..., str | None]

    def __call__(self, backend: str, device_type: str, properties: tuple, *arguments) -> Tensor:
        """Run the op for inputs with such properties, outside of autocast."""
        function = self.get_function(self.choose(backend, device_type, *properties))
        with no_autocast(device_type):
            return function(*arguments)

    def get_function(self, backend: str) -> Callable[..., Tensor]:
        """Return the function of "eager", "torch" or "triton"."""
        return self.import_triton() if backend == "triton" else getattr(self, backend)

    def refuse_triton(self, device_type: str, *properties) -> str | None:
        """Return why the Triton kernels cannot run on such inputs, None if they can."""
        return find_triton_obstacle(device_type) or self.refuse(*properties)

    def choose(self, backend: str, device_type: str, *properties) -> str:
        """Return the backend that runs when `backend` is asked for; log the choice once per process.

        Raises:
            ValueError: unknown name.
            RuntimeError: known, but not available.
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown {self.name} backend {backend!r}: choose one of {', '.join(BACKENDS)}")
        reason = None
        if backend == "triton" or (backend == "auto" and device_type == "cuda"):
            reason = self.refuse_triton(device_type, *properties)
        if backend == "triton" and reason:
            raise RuntimeError(f"{self.name} backend 'triton' is not available: {reason}; use backend='torch'")
        chosen, level, why = backend, logging.INFO, "asked for"
        if backend == "auto" and device_type != "cuda":
            chosen, why = "torch", "auto, triton needs CUDA"
        elif backend == "auto" and reason:
            chosen, level = "torch", logging.WARNING
            why = f"auto, slower than triton, which is not available: {reason}"
        elif backend == "auto":
            chosen, why = "triton", "auto"
        if not torch.compiler.is_compiling():  # logging would break the graph
            log_once(level, self.name, chosen, device_type, why)
        return chosen


@functools.cache
def find_triton_obstacle(device_type: str) -> str | None:
    """Return why Triton cannot run on this machine for tensors on such a device, None if it can."""
    # `find_spec` cannot be traced; when compiling, the import itself will tell
    if not torch.compiler.is_compiling() and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device_type != "cuda" and not (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 in the environment, not {device_type}"
    if device_type == "cuda":
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "torch sees no NVIDIA GPU"
        if torch.cuda.get_device_capability() < (8, 0):
            return "it needs a GPU of compute capability 8.0 or later"
    elif not torch.compiler.is_compiling():
        return _find_interpreter_obstacle()
    return None


def _find_interpreter_obstacle() -> str | None:
    """Return why Triton's interpreter cannot run here, None if it can."""
    import numpy
    import triton

    if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        return f"the interpreter of triton 3.6 needs numpy below 2.4, not {numpy.__version__}: pip install 'numpy<2.4'"
    return None


@functools.cache
def log_once(level: int, op: str, backend: str, device_type: str, why: str) -> None:
    logger.log(level, "%s on %s: backend %s (%s)", op, device_type, backend, why)
