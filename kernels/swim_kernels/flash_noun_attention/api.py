"""The public op: checks its arguments, chooses the flash attention and the backend of the maps."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from swim_kernels.attention_rows.arguments import check_arguments, op_properties
from swim_kernels.flash_noun_attention.node import FlashNounAttention
from swim_kernels.flash_noun_attention.providers.base import Call, Provider, Unsupported
from swim_kernels.flash_noun_attention.providers.flash_attn import FlashAttn2, FlashAttn3, FlashAttn4
from swim_kernels.flash_noun_attention.providers.torch import TorchCpu, TorchCuda, TorchCudnn
from swim_kernels.noun_attention.api import OP, check_heads
from swim_kernels.runtime.numerics import no_autocast, to_autocast_dtype
from swim_kernels.structs.noun_queries import NounQueries

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (TorchCpu(), TorchCuda(), TorchCudnn(), FlashAttn2(), FlashAttn3(), FlashAttn4())
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
    heads: str = "mean",
    provider: str | Provider = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return causal self-attention and, for a few of its rows, the probabilities on chosen keys, averaged over heads.

    The same results and gradients as the attention by itself and `noun_attention` by itself, in one node. No dropout,
    no cap on the scores, no attention sink: with them the lse of the attention would not be that of the maps.

    Args:
        query: [B, Hq, L, D], after rotary embedding; any strides.
        key, value: [B, Hkv, L, D]; query head h uses head h // (Hq / Hkv).
        queries: R rows. Rows whose ranges all end at their own token are taken for those that the attention computes:
            the token itself and all before it, within the window, the mask and the packed sequence
            (`NounQueries.key_start`); their lse is the attention's. On an accelerator what window, mask and packed
            sequences ask of them is not checked, and no value is read but, once, `NounQueries.ranges` of rows that were
            made there. All others, such as those over key sets, have a softmax of their own.
        scale: factor on the scores; D ** -0.5 if not given.
        window: a token sees itself and at most `window` − 1 tokens before it.
        mask: bool [B or 1, 1, L, L], True where a token sees a key; causal itself. For "torch_cpu".
        cu_seqlens: int32 [S + 1], starts and ends of the sequences that are packed into a batch of one.
        max_length: length of the longest of them.
        heads: of the maps, "mean" or "each", as for `noun_attention`.
        provider: "torch_cpu", "torch_cuda", "torch_cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4", "auto"
            ("torch_cpu" or "torch_cuda", by the device), or a `Provider` of your own.
        backend: of the maps, as for `noun_attention`: "torch", "triton" or "auto".

    Returns:
        Output [B, Hq, L, D] in the dtype of the query, maps [R, N] or [R, Hq, N] fp32 (fp64 for fp64 inputs). Under
        autocast the inputs are cast first, as torch's attention does it.

    Raises:
        Unsupported: one node cannot do what is asked for; attention and `noun_attention` by themselves may. Raised
            before anything is computed.
        TypeError, ValueError, RuntimeError: as `noun_attention`.
    """
    query, key, value = to_autocast_dtype(query, key, value)
    call = Call(query.shape[-1] ** -0.5 if scale is None else scale, window, mask, cu_seqlens, max_length)
    chosen = _get_provider(provider, query)
    _check_call(query, key, value, call, backend)
    chosen.check(query, key, value, call)
    check_arguments(query, key, queries, call.scale, None)
    check_heads(heads)
    own_softmax = _has_own_softmax(queries, call)
    if not own_softmax:
        _check_ranges(queries, query.shape[2], call)
    name = OP.choose(backend, query.device.type, *op_properties(query, key))
    maps_backend = importlib.import_module(OP.get_function(name).__module__)
    with no_autocast(query.device.type):
        return FlashNounAttention.apply(query, key, value, queries, call, chosen, maps_backend, own_softmax, heads)


def check_providers(device: torch.device | str) -> tuple[str, dict[str, str | None]]:
    """Return the provider that "auto" is on a device, and why each cannot run a call of a 7B model there, or None."""
    query, key = (torch.empty(1, 256, heads, 128, dtype=torch.bfloat16, device=device) for heads in (28, 4))
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    reasons = {}
    for name, provider in PROVIDERS.items():
        try:
            reasons[name] = provider.check(query, key, key, Call(128**-0.5))
        except Unsupported as reason:
            reasons[name] = str(reason)
    return _get_provider("auto", query).name, reasons


def _get_provider(provider: str | Provider, query: Tensor) -> Provider:
    if isinstance(provider, Provider):
        return provider
    if provider == "auto":
        provider = "torch_cuda" if query.device.type == "cuda" else "torch_cpu"
    if provider not in PROVIDERS:
        raise ValueError(f"unknown flash attention provider {provider!r}: choose one of auto, {', '.join(PROVIDERS)}")
    return PROVIDERS[provider]


def _check_call(query: Tensor, key: Tensor, value: Tensor, call: Call, backend: str) -> None:
    """Raise Unsupported for what no provider can do."""
    if backend == "eager":
        raise Unsupported("the maps are to be eager, which is a way of computing them by themselves")
    if query.shape[2] != key.shape[2]:
        raise Unsupported(f"{query.shape[2]} queries and {key.shape[2]} keys are no self-attention")
    if value.shape != key.shape or value.dtype != query.dtype:
        raise Unsupported(f"value is {value.dtype} {list(value.shape)}, key {key.dtype} {list(key.shape)}")
    if call.mask is not None:
        batch, _, length, _ = query.shape
        mask, shapes = call.mask, [(batch, 1, length, length), (1, 1, length, length)]
        if mask.dtype != torch.bool or mask.shape not in shapes:
            raise Unsupported(f"the mask must be bool {list(shapes[0])}, not {mask.dtype} {list(mask.shape)}")
    if call.cu_seqlens is not None and (query.shape[0] != 1 or call.max_length is None):
        raise Unsupported("packed sequences come in a batch of one, with max_length")


def _has_own_softmax(queries: NounQueries, call: Call) -> bool:
    """Return True for rows that no causal attention computes, or that this one does not: it begins at key 0."""
    if queries.ranges == "causal":
        return call.mask is call.cu_seqlens is call.window is None
    return queries.ranges == "any"


def _check_ranges(queries: NounQueries, length: int, call: Call) -> None:
    """Raise Unsupported if a causal softmax of the rows is seen not to be the one that the attention computes."""
    if queries.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if call.mask is not None:
        sequence = queries.sequence if len(call.mask) > 1 else torch.zeros_like(queries.sequence)
        keys = torch.arange(length)
        inside = (keys >= queries.key_start[:, None]) & (keys < queries.key_end[:, None])
        wrong = (call.mask[sequence, 0, queries.position] != inside).any(dim=1)
    else:
        first = torch.zeros_like(queries.position)
        if call.cu_seqlens is not None:
            segment = torch.searchsorted(call.cu_seqlens, queries.position.to(call.cu_seqlens.dtype), right=True)
            first = call.cu_seqlens[segment - 1].to(first.dtype)
        if call.window is not None:
            first = torch.maximum(first, queries.position + 1 - call.window)
        wrong = queries.key_start != first
    if wrong.any():
        row = int(wrong.nonzero()[0])
        position, first, end = (int(x[row]) for x in (queries.position, queries.key_start, queries.key_end))
        raise Unsupported(
            f"row {row} has the keys [{first}, {end}), which are not those that the attention of token {position} has"
        )
