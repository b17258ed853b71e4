"""Several tensors moved at once: a copy of a few numbers costs the host as much as one of megabytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, at which vectorised loads begin


def pin_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of CPU tensors in one block of page-locked memory, contiguous."""
    return _views(_gather(tensors, pin=True), tensors)


def move_together(tensors: Sequence[Tensor], device: torch.device | str, non_blocking: bool = False) -> list[Tensor]:
    """Return tensors on another device, contiguous.

    From the CPU to a CUDA device they go in one copy through page-locked memory of their own, which the host does not
    wait for; what `pin_together` returned goes as it is.
    """
    device = torch.device(device)
    if device.type != "cuda" or any(tensor.device.type != "cpu" for tensor in tensors):
        return [tensor.to(device, non_blocking=non_blocking) for tensor in tensors]
    block = _find_block(tensors)
    if block is None:
        block = _gather(tensors, pin=True)
    return _views(block.to(device, non_blocking=True), tensors)


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Return the first byte of each tensor in their block, and the end."""
    offsets = [0]
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets


def _gather(tensors: Sequence[Tensor], pin: bool) -> Tensor:
    """Return a block that holds the tensors: uint8, on the CPU."""
    block = torch.empty(_offsets(tensors)[-1], dtype=torch.uint8, pin_memory=pin)
    for view, tensor in zip(_views(block, tensors), tensors, strict=True):
        view.copy_(tensor)
    return block


def _views(block: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a block as tensors of the same types and shapes."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return [
        block[first : first + size].view(tensor.dtype).view(tensor.shape)
        for first, size, tensor in zip(_offsets(tensors), sizes, tensors, strict=False)
    ]


def _find_block(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the block of tensors that `pin_together` returned, None for others."""
    storage = tensors[0].untyped_storage()
    begin = storage.data_ptr()
    lie = [tensor.data_ptr() - begin if tensor.numel() else None for tensor in tensors]
    offsets = _offsets(tensors)
    if storage.nbytes() != offsets[-1] or not tensors[0].is_pinned():
        return None
    if any(at is not None and at != first for at, first in zip(lie, offsets, strict=False)):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage)
