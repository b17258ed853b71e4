"""Move of test inputs to the device of the Triton kernels: `--device` of pytest."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.helpers.pretend_gpu import is_running

DEVICE = torch.device("cpu")  # set by the conftest


def on_device(values, device: torch.device | None = None):
    """Return a tensor, a struct or a sequence of them on the device, tensors as leaves with their strides.

    What is there already is returned as it is.
    """
    device = device or DEVICE
    if isinstance(values, (tuple, list)):
        return type(values)(on_device(value, device) for value in values)
    if not hasattr(values, "device") or values.device.type == device.type:
        return values
    if not isinstance(values, Tensor):
        return values.to(device)
    size = values.untyped_storage().nbytes() // values.element_size()
    memory = values.detach().as_strided((size,), (1,), 0).to(device)
    moved = memory.as_strided(values.shape, values.stride(), values.storage_offset())
    return moved.requires_grad_(values.requires_grad)


def triton_on_device(run):
    """Decorate `run(*inputs, backend=…, **options)`: the Triton backend runs on the device, results come back."""

    @functools.wraps(run)
    def moved(*inputs, **options):
        if options.get("backend") != "triton":
            return run(*inputs, **options)
        home = next(value for value in inputs if isinstance(value, Tensor)).device
        options = {name: on_device(value) for name, value in options.items()}
        return on_device(run(*on_device(inputs), **options), home)

    return moved


def skip_without_memory(gigabytes: int) -> None:
    """Skip a test on a GPU with less free memory; on the CPU memory is only reserved."""
    if is_running():
        pytest.skip("a pretend GPU's memory is the host's")
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
            pytest.skip(f"needs {gigabytes} GB of GPU memory")
