"""When a layer's attention and its noun maps can be one autograd node, and with which flash attention.

transformers names the attention of a layer; the node needs the same one from a provider of `swim_kernels`, for the same
mask. Where it has none, or the attention is not plain causal self-attention, output and maps are computed separately.
"""

import functools
import logging

import torch
from torch import Tensor

from swim_kernels import NounQueries, flash_noun_attention_refusal

logger = logging.getLogger(__name__)

PROVIDERS = {
    "sdpa": "auto",
    "flash_attention_2": "flash_attn_2",
    "flash_attention_3": "flash_attn_3",
    "flash_attention_4": "flash_attn_4",
}
_FLASH = tuple(name for name in PROVIDERS if name != "sdpa")
# what changes the softmax, or what it is applied to, so that its denominator is not that of the maps
_OTHER_SOFTMAX = ("softcap", "s_aux", "position_bias")


def is_right_padded(attention_mask: Tensor | None, attention: str) -> bool | None:
    """Return True if all padding of a batch [B, L] comes last, None if the attention does not ask.

    Waits for the device, as transformers does too to see if there is padding.
    """
    if attention not in _FLASH or attention_mask is None or attention_mask.ndim != 2:
        return None
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def choose(
    attention: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    attention_mask: Tensor | None,
    queries: NounQueries,
    backend: str,
    kwargs: dict,
) -> dict | str:
    """Options of `flash_noun_attention` for a layer, or why it cannot be used.

    Args:
        attention: the layer's own, as transformers calls it.
        tensors: query, key, value [B, H, L, D].
        attention_mask: as that attention gets it: bool [B, 1, L, L] for "sdpa", bool [B, L] for flash attention.
        kwargs: what else it gets.
    """
    if attention not in PROVIDERS:
        return f"there is no provider for the attention {attention!r}"
    if kwargs.get("dropout"):
        return "the attention has dropout"
    if kwargs.get("is_causal") is False:  # None: as the module says, which a decoder's says
        return "the attention is not causal"
    changed = [name for name in _OTHER_SOFTMAX if kwargs.get(name) is not None]
    if changed:
        return f"the attention has {changed[0]}"
    options = {"provider": PROVIDERS[attention]}
    if attention == "sdpa":
        options["mask"] = attention_mask  # a window and packed sequences are part of it
    else:
        reason = _flash_options(options, tensors[0], attention_mask, kwargs)
        if reason:
            return reason
    return flash_noun_attention_refusal(*tensors, queries, backend=backend, **options) or options


def _flash_options(options: dict, query: Tensor, attention_mask: Tensor | None, kwargs: dict) -> str | None:
    window = kwargs.get("sliding_window")
    if window is not None and query.shape[2] > window:
        options["window"] = window
    if attention_mask is not None:  # what comes behind a causal token does not concern it
        return None if kwargs.get("right_padded") else "the batch is padded on the left"
    if kwargs.get("cu_seq_lens_q") is not None:
        options |= {"cu_seqlens": kwargs["cu_seq_lens_q"], "max_length": kwargs.get("max_length_q")}
    elif len(query) == 1 and _restarts(kwargs.get("position_ids")):
        return (
            "sequences are packed by position ids alone: give cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k"
        )
    return None


def _restarts(position_ids: Tensor | None) -> bool:
    """Whether position ids [1, L] are those of several sequences, to which flash attention then restricts itself."""
    return position_ids is not None and bool((position_ids.diff() != 1).any())


def say(attention: str, device: torch.device, chosen: dict | str) -> None:
    """One log line per process for every choice."""
    if torch.compiler.is_compiling():
        return
    reason = chosen if isinstance(chosen, str) else None
    _say_once(attention, device.type, chosen["provider"] if reason is None else None, reason)


@functools.cache
def _say_once(attention: str, device_type: str, provider: str | None, reason: str | None) -> None:
    if reason is None:
        logger.info("noun maps behind %s on %s: one node with the attention (%s)", attention, device_type, provider)
    else:
        logger.info("noun maps behind %s on %s: an op of their own (%s)", attention, device_type, reason)
