"""Activations of the decoder layers, kept in host memory between forward and backward.

With (non-reentrant) activation checkpointing these are the layers' inputs: 28 × 0.9 GB in bf16 at 128 k tokens of a 7B
model. Without, they are all large activations, and one that several operations save is copied several times.

The copies are asynchronous for the host, through pinned memory, and in order with the computation on its own stream:
they cost their time on the bus. On the CPU they are plain copies, which save nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swim_fast.families import get_family
from swim_fast.modeling.hooks import add_context

SMALLEST = 1 << 20  # bytes of a tensor that is worth a copy


@dataclass
class OnHost:
    """A saved tensor in host memory, with the same strides."""

    tensor: Tensor
    device: torch.device  # to go back to


def to_host(tensor: Tensor) -> Tensor | OnHost:
    """Copy a tensor that autograd saves to the host, if it is a large activation.

    Weights stay, which are on the device anyway: parameters, views of them, and their casts by autocast. So does what
    has no gradient: frozen weights, masks, and the rotary tables that all layers share.
    """
    if tensor.nbytes < SMALLEST or not tensor.requires_grad or _is_weight(tensor):
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return OnHost(host.copy_(tensor.detach(), non_blocking=True), tensor.device)


def to_device(saved: Tensor | OnHost) -> Tensor:
    """Return the tensor that was given to `to_host`, with the same bits."""
    return saved.tensor.to(saved.device, non_blocking=True) if isinstance(saved, OnHost) else saved


def offload_activations(model: nn.Module) -> None:
    """Keep the large activations of a model's decoder in host memory.

    Gradients are the same bits. Works with noun attention and with checkpointing, enabled before or after.
    """
    # Around the stack and not inside a layer, where checkpointing has hooks of its own for what it recomputes.
    add_context(
        model.get_submodule(get_family(model).language_model),
        "offload",
        lambda language_model, kwargs: torch.autograd.graph.saved_tensors_hooks(to_host, to_device),
    )


def _is_weight(tensor: Tensor) -> bool:
    whole = tensor if tensor._base is None else tensor._base
    if isinstance(whole, nn.Parameter):
        return True
    cast = whole.grad_fn
    return cast is not None and cast.name() == "ToCopyBackward0" and hasattr(cast.next_functions[0][0], "variable")
