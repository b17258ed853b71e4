"""What backward needs of the decoder layers, in the host's memory meanwhile.

With activation checkpointing (not the reentrant kind) that is the input of each layer: at 128 k tokens of a 7B model
28 × 0.9 GB in bf16. Without it, it is every large activation, and one that several operations save goes several times.

The copies are asynchronous for the host, through pinned memory, and in order with the computation on its own stream:
what they cost is their time on the bus. On the CPU they are plain copies, which save nothing.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swim_fast.modeling.families import family_of

SMALLEST = 1 << 20  # bytes of a tensor that is worth the way


@dataclass
class OnHost:
    """A saved tensor, of the same strides, in the host's memory."""

    tensor: Tensor
    device: torch.device  # where it belongs


def to_host(tensor: Tensor) -> Tensor | OnHost:
    """Take a tensor that autograd saves to the host, if it is a large activation.

    Weights stay, as they are there anyway: parameters, views of them, and their casts by autocast. So does what has no
    gradient: frozen weights, masks, and rotary tables, which all layers share.
    """
    if tensor.nbytes < SMALLEST or not tensor.requires_grad or _is_weight(tensor):
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return OnHost(host.copy_(tensor.detach(), non_blocking=True), tensor.device)


def to_device(saved: Tensor | OnHost) -> Tensor:
    """Bring back what `to_host` gave; the same bits."""
    return saved.tensor.to(saved.device, non_blocking=True) if isinstance(saved, OnHost) else saved


def offload_activations(model: nn.Module) -> None:
    """Let the decoder of a supported model save its large activations in the host's memory.

    Gradients are the same bits. Works with noun attention and with checkpointing, enabled before or after.
    """
    language_model = model.get_submodule(family_of(model).language_model)
    forward = language_model.forward

    # Around the stack and not inside a layer: there, checkpointing has hooks of its own for what it computes again.
    @functools.wraps(forward)
    def offloaded(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(to_host, to_device):
            return forward(*args, **kwargs)

    language_model.forward = offloaded


def _is_weight(tensor: Tensor) -> bool:
    whole = tensor if tensor._base is None else tensor._base
    if isinstance(whole, nn.Parameter):
        return True
    cast = whole.grad_fn
    return cast is not None and cast.name() == "ToCopyBackward0" and hasattr(cast.next_functions[0][0], "variable")
