"""Computing as written: whatever the process is set to, and in a fixed order."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Under autocast float32 products would become bf16 ones, in a forward or a backward."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def add_at(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] += values along dimension 0, repeated indices in a fixed order."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)  # one after the other; index_put_ would go parallel with atomics
    else:
        out.index_put_((index,), values, accumulate=True)  # sorts the indices; index_add_ would use atomics
