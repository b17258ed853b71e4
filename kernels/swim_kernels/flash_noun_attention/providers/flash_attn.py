"""Providers for the packages flash-attn 2, flash-attn-3 and flash-attn-4, which are imported when they are used.

None of them has run here, for there was no GPU. What each call hands over was checked against the published signatures
(flash-attn 2.8.3; `hopper/flash_attn_interface.py` of its repository for 3; flash-attn-4 4.0.0b36), and with stand-ins
of those signatures that compute on the CPU.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from swim_kernels.flash_noun_attention.providers.base import (
    Call,
    Provider,
    Unsupported,
    check_on_cuda,
    from_flash,
    lse_from_flash,
    lse_to_flash,
    to_flash,
    wants_determinism,
)


class _FlashAttn(Provider):
    """A package: which of its functions run, and with which options."""

    package: str  # what to install
    gpus: str  # that it runs on, as messages name them
    capabilities: tuple[tuple[int, int], tuple[float, int]]  # of those: from, and below
    module: str  # what to import
    names: tuple[str, str]  # of its forward and backward
    packed_names: tuple[str, str]  # the same for packed sequences
    kept = slice(0)  # of what the forward returns after output and lse
    grad_output_position = 0  # among the tensors of the backward

    def check(self, query, key, value, call):
        check_on_cuda(query, call)
        self._check_capability(query.device)
        try:
            self._import_functions(call)
        except (ImportError, AttributeError) as error:
            raise Unsupported(f"{self.package} cannot be used: {error}") from error

    def forward(self, query, key, value, call):
        forward, _ = self._import_functions(call)
        inputs = (to_flash(x, call) for x in (query, key, value))
        output, lse, *rest = forward(*inputs, **self._forward_options(forward, call))
        return from_flash(output, call), lse_from_flash(lse, call), *rest[self.kept]

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        output, lse, *kept = forward
        _, backward = self._import_functions(call)
        # uninitialised memory in the library's layout: ours, for it is added to afterwards
        gradients = {n: torch.empty_like(to_flash(x, call)) for n, x in (("dq", query), ("dk", key), ("dv", value))}
        tensors = [query, key, value, output]
        tensors.insert(self.grad_output_position, grad_output)
        options = self._backward_options(backward, call, kept, grad_lse)
        backward(*(to_flash(x, call) for x in tensors), lse_to_flash(lse, call), **gradients, **options)
        return tuple(from_flash(gradient, call) for gradient in gradients.values())

    def _check_capability(self, device: torch.device) -> None:
        capability, (first, end) = torch.cuda.get_device_capability(device), self.capabilities
        if not first <= capability < end:
            major, minor = capability
            raise Unsupported(f"{self.package} runs on {self.gpus}; this GPU has compute capability {major}.{minor}")

    def _import_functions(self, call: Call) -> list[Callable]:
        module = importlib.import_module(self.module)
        return [getattr(module, name) for name in (self.names if call.cu_seqlens is None else self.packed_names)]

    def _forward_options(self, function: Callable, call: Call) -> dict[str, object]:
        raise NotImplementedError

    def _backward_options(
        self, function: Callable, call: Call, kept: list[Tensor], grad_lse: Tensor | None
    ) -> dict[str, object]:
        raise NotImplementedError


class FlashAttn2(_FlashAttn):
    """flash-attn 2.8: dense, packed, windows."""

    name, package, module = "flash_attn_2", "flash-attn", "flash_attn.flash_attn_interface"
    gpus, capabilities = "Ampere or newer (from 8.0)", ((8, 0), (math.inf, 0))
    names = ("_flash_attn_forward", "_flash_attn_backward")
    packed_names = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    kept = slice(1, 2)  # the state of its random numbers

    def _forward_options(self, function, call):
        return self._options(call) | {"return_softmax": False}

    def _backward_options(self, function, call, kept, grad_lse):
        return self._options(call) | {"deterministic": wants_determinism(), "rng_state": kept[0]}

    def _options(self, call: Call) -> dict[str, object]:
        return _packed(call) | {
            "dropout_p": 0.0,
            "softmax_scale": call.scale,
            "causal": True,
            "window_size_left": -1 if call.window is None else call.window - 1,
            "window_size_right": 0 if call.window is not None else -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }


class FlashAttn3(_FlashAttn):
    """flash-attn-3, for Hopper: dense, packed, windows. Argument names differ between its releases."""

    name, package, module = "flash_attn_3", "flash-attn-3", "flash_attn_interface"
    gpus, capabilities = "Hopper (9.0)", ((9, 0), (10, 0))
    names = packed_names = ("_flash_attn_forward", "_flash_attn_backward")

    def _forward_options(self, function, call):
        return _select(function, self._options(call), ("q", "k", "v"))

    def _backward_options(self, function, call, kept, grad_lse):
        given = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
        return _select(function, self._options(call) | {"deterministic": wants_determinism()}, given)

    def _options(self, call: Call) -> dict[str, object]:
        """Return the options under every name that a release has had."""
        left, right = (-1, -1) if call.window is None else (call.window - 1, 0)
        return _packed(call) | {
            "softmax_scale": call.scale,
            "causal": True,
            "is_causal": True,
            "window_size": (left, right),
            "window_size_left": left,
            "window_size_right": right,
        }


class FlashAttn4(_FlashAttn):
    """flash-attn-4, for Hopper and Blackwell: dense, packed, windows. Its backward takes a gradient of lse."""

    name, package, module = "flash_attn_4", "flash-attn-4", "flash_attn.cute.interface"
    gpus, capabilities = "Hopper or newer (from 9.0)", ((9, 0), (math.inf, 0))
    names = packed_names = ("_flash_attn_fwd", "_flash_attn_bwd")
    grad_output_position = 4

    def takes_grad_lse(self, query):
        return query.shape[3] < 256  # its kernel for 256 on sm_100 has none

    def _forward_options(self, function, call):
        return self._options(call) | {"return_lse": True}

    def _backward_options(self, function, call, kept, grad_lse):
        dlse = None if grad_lse is None else lse_to_flash(grad_lse, call)
        return self._options(call) | {"deterministic": wants_determinism(), "dlse": dlse}

    def _options(self, call: Call) -> dict[str, object]:
        return _packed(call) | {
            "softmax_scale": call.scale,
            "causal": True,
            "window_size_left": None if call.window is None else call.window - 1,
            "window_size_right": None if call.window is None else 0,
        }


def _packed(call: Call) -> dict[str, object]:
    """Return where packed sequences start and end; nothing for a dense call."""
    if call.cu_seqlens is None:
        return {}
    lengths = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), call.max_length)
    return dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), call.cu_seqlens) | lengths


def _select(function: Callable, arguments: dict[str, object], given: tuple[str, ...]) -> dict[str, object]:
    """Return those arguments that the function has, and None for what else it insists on beside the `given` tensors."""
    parameters = get_parameters(function)
    insisted = [name for name, required in parameters.items() if required and name not in given]
    return dict.fromkeys(insisted) | {name: value for name, value in arguments.items() if name in parameters}


@functools.cache
def get_parameters(function: Callable) -> dict[str, bool]:
    """Return the name of every parameter and whether it must be given.

    Also of an operator of torch, whose Python signature hides them.
    """
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        return {argument.name: not argument.has_default_value() for argument in operator._schema.arguments}
    return {p.name: p.default is p.empty for p in inspect.signature(function).parameters.values()}
