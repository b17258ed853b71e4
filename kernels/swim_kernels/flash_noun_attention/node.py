"""Attention output and noun maps from one autograd node.

Forward: the flash attention, whose lse is taken over, then one pass over the keys that are read out. Backward: the
flash attention's own backward, which returns or fills ∂q, ∂k and ∂v, and then, in place, the rows' part of ∂q and the
maps' part of ∂k. A node of its own would have to return another ∂q, all zeros but for a handful of rows, and another
∂k.

    ∂q += scale Σ_j ds[r,h,j] · k_j,  ∂k_j += scale Σ_{r, h of its group} ds[r,h,j] · q,  ds = p · (w − δ)

as in `noun_attention/reference.py`. A backward that takes a gradient of lse is handed −δ at the rows' tokens, since
∂lse/∂s = p: the part −p · δ, which concerns every key, is then done by it, and p · w is left, on read-out keys only.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swim_kernels.flash_noun_attention.providers.flash_attn import FlashAttn2, FlashAttn3, FlashAttn4
from swim_kernels.flash_noun_attention.providers.torch import Call, Provider, TorchCpu, TorchCuda
from swim_kernels.noun_attention.api import OP, check_arguments, op_properties
from swim_kernels.runtime.numerics import add_at, no_autocast
from swim_kernels.structs.noun_queries import NounQueries

PROVIDERS: dict[str, Provider] = {
    provider.name: provider for provider in (TorchCpu(), TorchCuda(), FlashAttn2(), FlashAttn3(), FlashAttn4())
}


def flash_noun_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: NounQueries,
    *,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    provider: str | Provider = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal self-attention and, of a few of its rows, the head-averaged probabilities on chosen keys.

    The same results and gradients as the attention by itself and `noun_attention` by itself, in one node. No dropout,
    no cap on the scores, no attention sink: with them the lse of the attention would not be that of the maps.

    Args:
        query: [B, Hq, L, D], after rotary embedding; any strides.
        key, value: [B, Hkv, L, D]; query head h uses head h // (Hq / Hkv).
        queries: R rows; the softmax range of each must be what the attention computes: the token itself and all before
            it, within the window, the mask and the packed sequence (`NounQueries.key_start`). On an accelerator what
            window, mask and packed sequences ask of it is not checked.
        scale: factor on the scores; D ** -0.5 if not given.
        window: a token sees itself and at most `window` − 1 tokens before it.
        mask: bool [B or 1, 1, L, L], True where a token sees a key; causal itself. For "torch_cpu".
        cu_seqlens: int32 [S + 1], starts and ends of the sequences that are packed into a batch of one.
        max_length: length of the longest of them.
        provider: "torch_cpu", "torch_cuda", "flash_attn_2", "flash_attn_3", "flash_attn_4", "auto" (torch's for the
            device), or a `Provider` of your own.
        backend: of the maps, as for `noun_attention`: "torch", "triton" or "auto".

    Returns:
        Output [B, Hq, L, D] in the dtype of the query, maps [R, N] fp32 (fp64 for fp64 inputs). Under autocast the
        inputs are cast first, as torch's attention does it.

    Raises:
        TypeError, ValueError: as `noun_attention`, and where the provider cannot do what is asked for: see
            `flash_noun_attention_refusal`.
    """
    query, key, value = _autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = Call(scale, window, mask, cu_seqlens, max_length)
    provider = _provider(provider, query)
    check_arguments(query, key, queries, scale, None)
    refusal = _refusal(query, key, value, queries, call, provider, backend)
    if refusal:
        raise ValueError(f"flash_noun_attention with {provider.name}: {refusal}")
    maps_backend = _backend(query, key, backend)
    with no_autocast(query.device.type):
        return _FlashNounAttention.apply(query, key, value, queries, call, provider, maps_backend)


def flash_noun_attention_refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: NounQueries,
    *,
    window: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    provider: str | Provider = "auto",
    backend: str = "auto",
) -> str | None:
    """Why `flash_noun_attention` would refuse such arguments, None if it would not.

    On an accelerator no value is read but, once, `NounQueries.ranges` of rows that were made there.
    """
    query, key, value = _autocast(query, key, value)
    call = Call(1.0, window, mask, cu_seqlens, max_length)
    return _refusal(query, key, value, queries, call, _provider(provider, query), backend)


class _FlashNounAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, queries, call, provider, backend):
        ctx.set_materialize_grads(False)
        output, lse, *rest = provider.forward(query, key, value, call)
        maps = backend.maps_given_lse(query, key, queries, call.scale, _of_rows(lse, queries))
        ctx.queries, ctx.call, ctx.provider, ctx.backend = queries, call.with_tensors(None, None), provider, backend
        ctx.save_for_backward(query, key, value, *call.tensors(), output, lse, *rest)
        return output, maps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_maps):
        nothing = (None,) * 4
        if grad_output is None and grad_maps is None:
            return None, None, None, *nothing
        query, key, value, mask, cu_seqlens, *forward = ctx.saved_tensors
        call = ctx.call.with_tensors(mask, cu_seqlens)
        arguments = (query, key, ctx.queries, call.scale)
        wanted = ctx.needs_input_grad[:3]
        with no_autocast(query.device.type):
            lse = None if grad_maps is None else _of_rows(forward[1], ctx.queries)
            if grad_output is None:
                gradients = [
                    torch.zeros_like(x) if want else None for x, want in zip((query, key), wanted, strict=False)
                ]
                ctx.backend.add_gradients(*gradients, grad_maps, *arguments, lse)
                return *gradients, None, *nothing
            inputs = (_dense(grad_output), query, key, value, tuple(forward), call)
            if grad_maps is None:
                gradients = ctx.provider.backward(*inputs)
            elif ctx.provider.takes_grad_lse(query):
                deltas, weights = ctx.backend.deltas(grad_maps, *arguments, lse)
                gradients = ctx.provider.backward(*inputs, _grad_lse(deltas, forward[1], ctx.queries))
                narrow = (query, key, ctx.queries.within_key_sets(), call.scale)
                ctx.backend.add_gradients(*gradients[:2], grad_maps, *narrow, lse, weights)
            else:
                gradients = ctx.provider.backward(*inputs)
                ctx.backend.add_gradients(*gradients[:2], grad_maps, *arguments, lse)
        return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *nothing


def _of_rows(lse: Tensor, queries: NounQueries) -> Tensor:
    """[B, Hq, L] → [R, Hq]"""
    return lse[queries.sequence, :, queries.position]


def _grad_lse(deltas: Tensor, lse: Tensor, queries: NounQueries) -> Tensor:
    """−δ [R, Hq] at the rows' tokens of a zero [B, Hq, L]; the rows of one token add up."""
    batch, num_heads, length = lse.shape
    token = queries.sequence.long() * length + queries.position
    grad = lse.new_zeros(batch * length, num_heads)
    add_at(grad, token, -deltas)
    return grad.view(batch, length, num_heads).transpose(1, 2).contiguous()


def _dense(grad: Tensor) -> Tensor:
    """Expanded gradients, such as that of a sum, are written out: kernels want rows of memory."""
    return grad if grad.stride(-1) == 1 and 0 not in grad.stride() else grad.contiguous()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return tensors


def _provider(provider: str | Provider, query: Tensor) -> Provider:
    if isinstance(provider, Provider):
        return provider
    if provider == "auto":
        provider = "torch_cuda" if query.device.type == "cuda" else "torch_cpu"
    if provider not in PROVIDERS:
        raise ValueError(f"unknown flash attention provider {provider!r}: choose one of auto, {', '.join(PROVIDERS)}")
    return PROVIDERS[provider]


def _backend(query: Tensor, key: Tensor, backend: str) -> ModuleType:
    """The module with `maps_given_lse`, `deltas` and `add_gradients`."""
    name = OP.choose(backend, query.device.type, *op_properties(query, key))
    return importlib.import_module(OP.get_function(name).__module__)


def _refusal(
    query: Tensor, key: Tensor, value: Tensor, queries: NounQueries, call: Call, provider: Provider, backend: str
) -> str | None:
    if backend == "eager":
        return "the maps are to be eager, which is a way of computing them by themselves"
    if query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries and {key.shape[2]} keys are no self-attention"
    if value.shape != key.shape or value.dtype != query.dtype:
        return f"value is {value.dtype} {list(value.shape)}, key {key.dtype} {list(key.shape)}"
    if call.mask is not None:
        batch, _, length, _ = query.shape
        mask, shapes = call.mask, [(batch, 1, length, length), (1, 1, length, length)]
        if mask.dtype != torch.bool or mask.shape not in shapes:
            return f"the mask must be bool {list(shapes[0])}, not {mask.dtype} {list(mask.shape)}"
    if call.cu_seqlens is not None and (query.shape[0] != 1 or call.max_length is None):
        return "packed sequences come in a batch of one, with max_length"
    return provider.refusal(query, key, value, call) or _refusal_of_ranges(queries, query.shape[2], call)


def _refusal_of_ranges(queries: NounQueries, length: int, call: Call) -> str | None:
    """Why the softmax of the rows is not the one that the attention computes; None if it is, as far as can be seen
    without waiting for an accelerator."""
    if queries.ranges == "any":
        return "the softmax of a row does not end at its own token (key_end is not position + 1)"
    if queries.ranges == "causal" and call.mask is call.cu_seqlens is call.window is None:
        return "the softmax of a row does not begin with the sequence (key_start is not 0)"
    if queries.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if call.mask is not None:
        sequence = queries.sequence if len(call.mask) > 1 else torch.zeros_like(queries.sequence)
        keys = torch.arange(length)
        inside = (keys >= queries.key_start[:, None]) & (keys < queries.key_end[:, None])
        wrong = (call.mask[sequence, 0, queries.position] != inside).any(dim=1)
    else:
        first = torch.zeros_like(queries.position)
        if call.cu_seqlens is not None:
            place = torch.searchsorted(call.cu_seqlens, queries.position.to(call.cu_seqlens.dtype), right=True)
            first = call.cu_seqlens[place - 1].to(first.dtype)
        if call.window is not None:
            first = torch.maximum(first, queries.position + 1 - call.window)
        wrong = queries.key_start != first
    if not wrong.any():
        return None
    row = int(wrong.nonzero()[0])
    position, first, end = (int(x[row]) for x in (queries.position, queries.key_start, queries.key_end))
    return f"row {row} has the keys [{first}, {end}), which are not those that the attention of token {position} has"
