"""Launches of Triton kernels, the same for every op."""

from __future__ import annotations

import functools

import torch
import triton

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # as Triton calls them


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Launch a kernel on the device of its tensors; every launch goes through here."""
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, torch.Tensor))):
        kernel[grid](**arguments)


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
