"""The interface behind which a flash attention is used.

A provider hands out lse, the logarithm of the softmax's denominator, and lets its backward be called by itself. That is
all the node needs: the noun maps follow from lse, and their gradients are added to the ones that the backward returns.
"""

from __future__ import annotations

import abc
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Unsupported(ValueError):
    """Output and maps cannot come from one node; the message says why."""


@dataclass(frozen=True)
class Call:
    """Causal self-attention, but for query, key and value.

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
        """Return those to be saved for backward."""
        return self.mask, self.cu_seqlens

    def with_tensors(self, mask: Tensor | None, cu_seqlens: Tensor | None) -> Call:
        return replace(self, mask=mask, cu_seqlens=cu_seqlens)


class Provider(abc.ABC):
    """A flash attention. All tensors are [B, H, L, D], of any strides; of packed sequences B is 1."""

    name: str

    @abc.abstractmethod
    def check(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> None:
        """Raise Unsupported if it cannot do this call. Looks at shapes, dtypes and devices, at no value."""

    @abc.abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Return output [B, Hq, L, D], lse [B, Hq, L] (natural logarithm, fp32; fp64 for fp64 inputs), and any number
        of tensors that its backward wants."""

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
        """Return ∂query, ∂key, ∂value in memory that belongs to the caller, who adds to the first two.

        Args:
            forward: what the forward returned.
            grad_lse: [B, Hq, L], only if `takes_grad_lse`.
        """

    def takes_grad_lse(self, query: Tensor) -> bool:
        """Return whether the backward of such a query accepts a gradient of lse."""
        return False


def check_half_on_cuda(query: Tensor) -> None:
    """Raise Unsupported unless the query is for a CUDA kernel with 16-bit inputs."""
    if query.device.type != "cuda":
        raise Unsupported(f"it needs CUDA tensors, not {query.device.type}")
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise Unsupported(f"it needs bf16 or fp16, not {query.dtype}")


def check_on_cuda(query: Tensor, call: Call) -> None:
    """Raise Unsupported for what no flash attention on CUDA can do."""
    check_half_on_cuda(query)
    if call.mask is not None:
        raise Unsupported("it takes no mask")
    if query.shape[3] % 8 or query.shape[3] > 256:
        raise Unsupported(f"its head_dim must be a multiple of 8 up to 256, not {query.shape[3]}")


def to_flash(x: Tensor, call: Call) -> Tensor:
    """Return [B, H, L, D] in the layout of the CUDA libraries, [B, L, H, D] or packed [T, H, D], with D contiguous."""
    return with_dense_heads(x.transpose(1, 2) if call.cu_seqlens is None else x[0].transpose(0, 1))


def with_dense_heads(x: Tensor) -> Tensor:
    """Return `x` with its last dimension contiguous, copied only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def from_flash(x: Tensor, call: Call) -> Tensor:
    """Undo `to_flash`."""
    return x.transpose(1, 2) if call.cu_seqlens is None else x.transpose(0, 1)[None]


def lse_from_flash(lse: Tensor, call: Call) -> Tensor:
    """Return lse [B, H, L], or packed [H, T], as [B, H, L]."""
    return lse if call.cu_seqlens is None else lse[None]


def lse_to_flash(lse: Tensor, call: Call) -> Tensor:
    """Undo `lse_from_flash`."""
    return lse if call.cu_seqlens is None else lse[0]


def wants_determinism() -> bool:
    """Return whether the user asked for repeatable gradients: by torch's switch, or transformers' for flash-attn."""
    return torch.are_deterministic_algorithms_enabled() or os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"
