"""Providers for the packages flash-attn 2, flash-attn-3 and flash-attn-4, which are imported when they are used.

None of them has run here, for there was no GPU. What each call hands over was checked against the published signatures
(flash-attn 2.8.3; `hopper/flash_attn_interface.py` of its repository for 3; flash-attn-4 4.0.0b36), and with stand-ins
of those signatures that compute on the CPU.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable

import torch

from swim_kernels.flash_noun_attention.providers.torch import (
    Call,
    Provider,
    deterministic,
    from_flash,
    lse_from_flash,
    lse_to_flash,
    refusal_on_cuda,
    to_flash,
)


class _FlashAttn(Provider):
    package: str  # what to install
    module: str  # what to import
    names: tuple[str, str]  # of its forward and backward

    def refusal(self, query, key, value, call):
        reason = refusal_on_cuda(query, call)
        if reason:
            return reason
        try:
            self._functions()
        except (ImportError, AttributeError) as error:
            return f"{self.package} cannot be used: {error}"
        return None

    def _functions(self) -> tuple[Callable, Callable]:
        module = importlib.import_module(self.module)
        forward, backward = (getattr(module, name) for name in self.names)
        return forward, backward

    def _gradients(self, query, key, value, call):
        """Uninitialised memory for the gradients in the library's layout: ours, for it is added to afterwards."""
        return {name: torch.empty_like(to_flash(x, call)) for name, x in (("dq", query), ("dk", key), ("dv", value))}


class FlashAttn2(_FlashAttn):
    """flash-attn 2.8: dense, packed, windows."""

    name, package, module = "flash_attn_2", "flash-attn", "flash_attn.flash_attn_interface"
    names = ("_flash_attn_forward", "_flash_attn_backward")
    packed_names = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")

    def forward(self, query, key, value, call):
        forward, _ = self._functions_for(call)
        output, lse, _, random_state = forward(
            *(to_flash(x, call) for x in (query, key, value)), return_softmax=False, **self._common(call)
        )
        return from_flash(output, call), lse_from_flash(lse, call), random_state

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        output, lse, random_state = forward
        gradients = self._gradients(query, key, value, call)
        _, backward = self._functions_for(call)
        backward(
            *(to_flash(x, call) for x in (grad_output, query, key, value, output)),
            lse_to_flash(lse, call),
            **gradients,
            **self._common(call),
            deterministic=deterministic(),
            rng_state=random_state,
        )
        return tuple(from_flash(gradient, call) for gradient in gradients.values())

    def _functions_for(self, call):
        if call.cu_seqlens is None:
            return self._functions()
        module = importlib.import_module(self.module)
        return tuple(getattr(module, name) for name in self.packed_names)

    @staticmethod
    def _common(call) -> dict[str, object]:
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
    names = ("_flash_attn_forward", "_flash_attn_backward")

    def forward(self, query, key, value, call):
        forward, _ = self._functions()
        inputs = (to_flash(x, call) for x in (query, key, value))
        output, lse, *_ = forward(*inputs, **_known(forward, self._common(call), given=("q", "k", "v")))
        return from_flash(output, call), lse_from_flash(lse, call)

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        output, lse = forward
        gradients = self._gradients(query, key, value, call)
        given = ("dout", "q", "k", "v", "out", "softmax_lse", *gradients)
        _, backward = self._functions()
        backward(
            *(to_flash(x, call) for x in (grad_output, query, key, value, output)),
            lse_to_flash(lse, call),
            **gradients,
            **_known(backward, self._common(call) | {"deterministic": deterministic()}, given),
        )
        return tuple(from_flash(gradient, call) for gradient in gradients.values())

    @staticmethod
    def _common(call) -> dict[str, object]:
        """Under every name that a release has had; `_known` picks those of the one at hand."""
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
    names = ("_flash_attn_fwd", "_flash_attn_bwd")

    def takes_grad_lse(self, query):
        return query.shape[3] < 256  # its kernel for 256 on sm_100 has none

    def forward(self, query, key, value, call):
        forward, _ = self._functions()
        inputs = (to_flash(x, call) for x in (query, key, value))
        output, lse, *_ = forward(*inputs, return_lse=True, **self._common(call))
        return from_flash(output, call), lse_from_flash(lse, call)

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        output, lse = forward
        _, backward = self._functions()
        gradients = self._gradients(query, key, value, call)
        backward(
            *(to_flash(x, call) for x in (query, key, value, output, grad_output)),
            lse_to_flash(lse, call),
            **gradients,
            **self._common(call),
            deterministic=deterministic(),
            dlse=None if grad_lse is None else lse_to_flash(grad_lse, call),
        )
        return tuple(from_flash(gradient, call) for gradient in gradients.values())

    @staticmethod
    def _common(call) -> dict[str, object]:
        return _packed(call) | {
            "softmax_scale": call.scale,
            "causal": True,
            "window_size_left": None if call.window is None else call.window - 1,
            "window_size_right": None if call.window is None else 0,
        }


def _packed(call: Call) -> dict[str, object]:
    """Where packed sequences start and end; nothing for a dense call."""
    if call.cu_seqlens is None:
        return {}
    lengths = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), call.max_length)
    return dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), call.cu_seqlens) | lengths


def _known(function: Callable, arguments: dict[str, object], given: tuple[str, ...]) -> dict[str, object]:
    """Those arguments that the function has, and None for what else it insists on beside the `given` tensors."""
    parameters = parameters_of(function)
    insisted = [name for name, required in parameters.items() if required and name not in given]
    return dict.fromkeys(insisted) | {name: value for name, value in arguments.items() if name in parameters}


@functools.cache
def parameters_of(function: Callable) -> dict[str, bool]:
    """Name of every parameter, and whether it must be given; of an operator of torch, whose Python signature hides
    them, too."""
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        return {argument.name: not argument.has_default_value() for argument in operator._schema.arguments}
    return {p.name: p.default is p.empty for p in inspect.signature(function).parameters.values()}
