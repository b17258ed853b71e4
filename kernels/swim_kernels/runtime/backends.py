"""Which backend of an op runs: the same choice for every op, said once."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "torch", "triton")


def choose_backend(op: str, backend: str, device_type: str, missing: Callable[[], str | None]) -> str:
    """The backend that runs when `backend` is asked for; says so once per process.

    Args:
        op: its name, for the messages.
        missing: says why Triton cannot run on the inputs, None if it can.

    Raises:
        ValueError: unknown name.
        RuntimeError: known, but not available.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown {op} backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        reason = missing()
        if reason:
            raise RuntimeError(f"{op} backend 'triton' is not available: {reason}; use backend='torch'")
    if backend != "auto":
        _say(logging.INFO, op, backend, device_type, "asked for")
        return backend
    if device_type != "cuda":
        _say(logging.INFO, op, "torch", device_type, "auto, triton needs CUDA")
        return "torch"
    reason = missing()
    if reason:
        _say(logging.WARNING, op, "torch", device_type, f"auto, slower than triton, which is not available: {reason}")
        return "torch"
    _say(logging.INFO, op, "triton", device_type, "auto")
    return "triton"


@functools.cache
def triton_missing(device_type: str) -> str | None:
    """Why Triton cannot run on this machine, for tensors on such a device; None if it can."""
    if not _installed("triton"):
        return "triton is not installed (pip install triton)"
    if device_type != "cuda" and not (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 in the environment, not {device_type}"
    if device_type == "cuda":
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "torch sees no NVIDIA GPU"
        if torch.cuda.get_device_capability() < (8, 0):
            return "it needs a GPU of compute capability 8.0 or later"
    return None


def _installed(package: str) -> bool:
    if torch.compiler.is_compiling():
        return True  # cannot be traced; the import will say
    return importlib.util.find_spec(package) is not None


def _say(level: int, op: str, backend: str, device_type: str, why: str) -> None:
    if not torch.compiler.is_compiling():  # logging would break the graph
        say_once(level, op, backend, device_type, why)


@functools.cache
def say_once(level: int, op: str, backend: str, device_type: str, why: str) -> None:
    logger.log(level, "%s on %s: backend %s (%s)", op, device_type, backend, why)
