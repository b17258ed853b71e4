"""Providers for the flash attentions that torch brings along."""

from __future__ import annotations

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
    with_dense_heads,
)

_flash_attention_forward = torch.ops.aten._flash_attention_forward
_flash_attention_backward = torch.ops.aten._flash_attention_backward
_cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TorchCpu(Provider):
    """torch's flash attention on the CPU: any floating dtype, grouped heads, dense or with a mask."""

    name = "torch_cpu"

    def check(self, query, key, value, call):
        if query.device.type != "cpu":
            raise Unsupported(f"it needs CPU tensors, not {query.device.type}")
        if call.cu_seqlens is not None or (call.window is not None and call.mask is None):
            raise Unsupported("it knows packed sequences and windows only as a mask")

    def forward(self, query, key, value, call):
        return _cpu_forward(
            *_dense(query, key, value),
            0.0,
            call.mask is None,
            attn_mask=_additive(call.mask, query.dtype),
            scale=call.scale,
        )

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        output, lse = forward
        return _cpu_backward(
            *_dense(grad_output, query, key, value, output),
            lse,
            0.0,
            call.mask is None,
            attn_mask=_additive(call.mask, query.dtype),
            scale=call.scale,
        )


class TorchCuda(Provider):
    """torch's flash attention on CUDA: bf16 and fp16, grouped heads, dense or packed."""

    name = "torch_cuda"

    def check(self, query, key, value, call):
        check_on_cuda(query, call)
        parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, True)
        if not torch.backends.cuda.can_use_flash_attention(parameters):
            raise Unsupported("torch.backends.cuda.can_use_flash_attention says no")

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


class TorchCudnn(Provider):
    """cuDNN's attention as torch calls it, which `sdpa` prefers on Hopper: bf16 and fp16, grouped heads, dense."""

    name = "torch_cudnn"

    def check(self, query, key, value, call):
        check_on_cuda(query, call)
        if call.cu_seqlens is not None or call.window is not None:
            raise Unsupported("torch has no packed sequences and windows for it")
        parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, True)
        if not torch.backends.cuda.can_use_cudnn_attention(parameters):
            raise Unsupported("torch.backends.cuda.can_use_cudnn_attention says no")

    def forward(self, query, key, value, call):
        output, lse, first, second, _, _, seed, offset, _ = _cudnn_forward(
            query, key, value, None, True, 0.0, True, False, scale=call.scale
        )
        return output, lse.view(lse.shape[:3]), lse, first, second, seed, offset  # lse is [B, Hq, L, 1]

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        output, _, lse, first, second, seed, offset = forward
        length, about = query.shape[2], (first, second)
        arguments = (grad_output, query, key, value, output, lse, seed, offset, None, *about, length, length)
        return _cudnn_backward(*arguments, 0.0, True, scale=call.scale)


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    # of other strides torch 2.11 reads the wrong memory, and says nothing
    return tuple(map(with_dense_heads, tensors))


def _lengths(query: Tensor, call: Call) -> tuple[int, int]:
    length = query.shape[2] if call.cu_seqlens is None else call.max_length
    return length, length


def _torch_window(call: Call) -> dict[str, int]:
    return {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return 0 where the mask is True, −∞ elsewhere; made twice, not kept, since the bool mask serves all layers."""
    if mask is None:
        return None
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
