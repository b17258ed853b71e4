"""The interface behind which a flash attention is used, and the two that torch brings along.

A provider hands out lse, the logarithm of the softmax's denominator, and lets its backward be called by itself. That is
all the node needs: the noun maps follow from lse, and their gradients are added to the ones that the backward returns.
"""

from __future__ import annotations

import abc
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_flash_attention_forward = torch.ops.aten._flash_attention_forward
_flash_attention_backward = torch.ops.aten._flash_attention_backward
_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Call:
    """Causal self-attention: what a provider has to know beside query, key and value.

    Attributes:
        scale: factor on the scores.
        window: a token sees itself and at most `window` − 1 tokens before it; None: all of them.
        mask: bool [B or 1, 1, L, L], True where a token (third dimension) sees a key (fourth), or None. With a mask
            nothing else is masked: it is causal itself.
        cu_seqlens: int32 [S + 1], where packed sequences of a batch of one start and end, or None.
        max_length: the longest of the packed sequences.
    """

    scale: float
    window: int | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_length: int | None = None

    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """Those to be saved for backward."""
        return self.mask, self.cu_seqlens

    def with_tensors(self, mask: Tensor | None, cu_seqlens: Tensor | None) -> Call:
        return replace(self, mask=mask, cu_seqlens=cu_seqlens)


class Provider(abc.ABC):
    """A flash attention. All tensors are [B, H, L, D], of any strides; of packed sequences B is 1."""

    name: str

    @abc.abstractmethod
    def refusal(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> str | None:
        """Why it cannot do this call; None if it can. Looks at shapes, dtypes and devices, at no value."""

    @abc.abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Output [B, Hq, L, D], lse [B, Hq, L] (natural logarithm, fp32; fp64 for fp64 inputs), and any number of
        tensors that its backward wants."""

    @abc.abstractmethod
    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        forward: tuple[Tensor, ...],
        call: Call,
        grad_lse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """∂query, ∂key, ∂value in memory that belongs to the caller, who adds to the first two. `forward` is what the
        forward returned; `grad_lse` [B, Hq, L] comes only where `takes_grad_lse` says so."""

    def takes_grad_lse(self, query: Tensor) -> bool:
        """Whether the backward of such a query accepts a gradient of lse."""
        return False


class TorchCpu(Provider):
    """torch's flash attention on the CPU: any floating dtype, grouped heads, dense or with a mask."""

    name = "torch_cpu"

    def refusal(self, query, key, value, call):
        if query.device.type != "cpu":
            return f"it needs CPU tensors, not {query.device.type}"
        if call.cu_seqlens is not None or (call.window is not None and call.mask is None):
            return "it knows packed sequences and windows only as a mask"
        return None

    def forward(self, query, key, value, call):
        return _cpu_forward(
            query, key, value, 0.0, call.mask is None, attn_mask=_additive(call.mask, query.dtype), scale=call.scale
        )

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        output, lse = forward
        return _cpu_backward(
            grad_output,
            query,
            key,
            value,
            output,
            lse,
            0.0,
            call.mask is None,
            attn_mask=_additive(call.mask, query.dtype),
            scale=call.scale,
        )


class TorchCuda(Provider):
    """torch's flash attention on CUDA: bf16 and fp16, grouped heads, dense or packed."""

    name = "torch_cuda"

    def refusal(self, query, key, value, call):
        reason = refusal_on_cuda(query, call)
        if reason:
            return reason
        parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, True)
        if not torch.backends.cuda.can_use_flash_attention(parameters):
            return "torch.backends.cuda.can_use_flash_attention says no"
        return None

    def forward(self, query, key, value, call):
        output, lse, *random_state, _ = _flash_attention_forward(
            *(to_flash(x, call) for x in (query, key, value)),
            call.cu_seqlens,
            call.cu_seqlens,
            *_lengths(query, call),
            0.0,
            True,
            False,
            scale=call.scale,
            **_torch_window(call),
        )
        return from_flash(output, call), lse_from_flash(lse, call), *random_state

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        output, lse, *random_state = forward
        gradients = _flash_attention_backward(
            *(to_flash(x, call) for x in (grad_output, query, key, value, output)),
            lse_to_flash(lse, call),
            call.cu_seqlens,
            call.cu_seqlens,
            *_lengths(query, call),
            0.0,
            True,
            *random_state,
            scale=call.scale,
            **_torch_window(call),
        )
        return tuple(from_flash(gradient, call) for gradient in gradients)


def half_on_cuda(query: Tensor) -> str | None:
    """Why a CUDA kernel for 16-bit inputs refuses the query; None if it does not."""
    if query.device.type != "cuda":
        return f"it needs CUDA tensors, not {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, not {query.dtype}"
    return None


def refusal_on_cuda(query: Tensor, call: Call) -> str | None:
    """What the flash attentions on CUDA have in common."""
    if call.mask is not None:
        return half_on_cuda(query) or "it takes no mask"
    if query.shape[3] % 8 or query.shape[3] > 256:
        return half_on_cuda(query) or f"its head_dim must be a multiple of 8 up to 256, not {query.shape[3]}"
    return half_on_cuda(query)


def to_flash(x: Tensor, call: Call) -> Tensor:
    """[B, H, L, D] → the layout of the CUDA libraries, [B, L, H, D], packed [T, H, D]; a view with D contiguous."""
    x = x.transpose(1, 2) if call.cu_seqlens is None else x[0].transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def from_flash(x: Tensor, call: Call) -> Tensor:
    """The way back of `to_flash`."""
    return x.transpose(1, 2) if call.cu_seqlens is None else x.transpose(0, 1)[None]


def lse_from_flash(lse: Tensor, call: Call) -> Tensor:
    """[B, H, L], packed [H, T] → [B, H, L]"""
    return lse if call.cu_seqlens is None else lse[None]


def lse_to_flash(lse: Tensor, call: Call) -> Tensor:
    """The way back of `lse_from_flash`."""
    return lse if call.cu_seqlens is None else lse[0]


def deterministic() -> bool:
    """Whether the user asked for repeatable gradients: torch's switch, or the one transformers has for flash-attn."""
    return torch.are_deterministic_algorithms_enabled() or os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"


def _lengths(query: Tensor, call: Call) -> tuple[int, int]:
    length = query.shape[2] if call.cu_seqlens is None else call.max_length
    return length, length


def _torch_window(call: Call) -> dict[str, int]:
    return {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where the mask is True, −∞ elsewhere; made twice rather than kept, since the bool mask serves all layers."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
