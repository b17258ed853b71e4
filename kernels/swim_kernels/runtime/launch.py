"""Launches of Triton kernels, the same for every op."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch
import triton

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # as Triton calls them


_compiling: dict[int, set[str]] = {}  # thread → builds that it has compiled
_locks: dict[object, threading.Lock] = {}  # kernel → held while a thread compiles it


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Launch a kernel on the device of its tensors; every launch goes through here."""
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, torch.Tensor))):
        if not _compiling:
            kernel[grid](**arguments)
            return
        with _locks.setdefault(kernel, threading.Lock()):  # not twice at once
            if threading.get_ident() in _compiling:
                _compiling[threading.get_ident()].add(kernel.warmup(grid=grid, **arguments).hash)
            else:
                kernel[grid](**arguments)


@contextlib.contextmanager
def compile_only() -> Iterator[set[str]]:
    """Let launches of this thread compile their kernels and not run them; give the hashes of the builds."""
    builds = _compiling[threading.get_ident()] = set()
    try:
        yield builds
    finally:
        del _compiling[threading.get_ident()]


def is_interpreted(kernel) -> bool:
    """Return whether a kernel was defined under `TRITON_INTERPRET=1`."""
    return not isinstance(kernel, triton.JITFunction)


@functools.cache
def get_architecture(device: torch.device) -> int:
    """Return the compute capability as 80, 90, 100 …; 90 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def count_processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; that of an H100 in the interpreter."""
    return 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(num_tiles: int, others: int, processors: int, least: int = 1, ample: int = 0) -> int:
    """Return the number of splits that fill a GPU: two programs for each processor, or one.

    Args:
        num_tiles: what is split.
        others: programs of each split.
        least: tiles of a split at least, where there are as many.
        ample: tiles of a split at least where there are two programs for each processor.
    """
    one, two = max(1, processors // others), max(1, 2 * processors // others)
    return max(1, min(two if num_tiles >= two * ample else one, num_tiles // least))
