"""Numerics that ops share: precisions, independence of the process's settings, and sums in a fixed order."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which inputs of `dtype` are computed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the dtype of an argument is one of `FLOATS`."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")


def has_autocast(device_type: str) -> bool:
    """Return whether autocast knows the device."""
    # torch 2.11 cannot trace the question; devices that compile have autocast
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Return a context without autocast, under which fp32 products would become bf16 ones."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else contextlib.nullcontext()


def to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors as torch's attention takes them: under autocast in its dtype, float64 as it is."""
    device_type = tensors[0].device.type
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return tensors


def add_at(out: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values to `out[index]` along dimension 0, repeated indices in a fixed order."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)  # one after the other; index_put_ would go parallel with atomics
    else:
        out.index_put_((index,), values, accumulate=True)  # sorts the indices; index_add_ would use atomics


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b in the precision of its operands, whatever fp32 products are set to."""
    if a.dtype == torch.float64 or _has_ieee_products(a.device):
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


def _has_ieee_products(device: torch.device) -> bool:
    """Return whether fp32 products are known to be made in IEEE precision."""
    if device.type != "cpu":
        return device.type != "cuda"
    if hasattr(torch.backends.mkldnn, "matmul"):
        return torch.backends.mkldnn.matmul.fp32_precision not in ("tf32", "bf16")
    return torch.get_float32_matmul_precision() == "highest"


def interpolation(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Return the bilinear weights [pixels, cells] of the cells in every pixel of a row or column, half-pixel centres.

    From exact integers: in units of 1 / (2 · pixels) cell, pixel x lies at (2 x + 1) · cells - pixels.
    """
    position = (2 * torch.arange(pixels, device=like.device) + 1) * cells - pixels
    position = position.clamp(0, 2 * pixels * (cells - 1))[:, None]
    before = position // (2 * pixels)
    after = (position % (2 * pixels)).to(like.dtype) / (2 * pixels)
    cell = torch.arange(cells, device=like.device)
    return torch.where(cell == before, 1 - after, 0) + torch.where(cell == before + 1, after, 0)
