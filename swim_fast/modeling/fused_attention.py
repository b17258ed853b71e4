"""Choice of the flash attention with which one autograd node gives a layer's output and its noun maps.

transformers names the attention of a layer; the node needs the same one from a provider of `swim_kernels`, for the same
mask. Where there is none, or the attention is not plain causal self-attention, output and maps are computed separately.
"""

import functools
import logging

import torch
from torch import Tensor

from swim_kernels import Unsupported

logger = logging.getLogger(__name__)

PROVIDERS = {
    "sdpa": "auto",  # unless `attach_noun_attention` is told which
    "flash_attention_2": "flash_attn_2",
    "flash_attention_3": "flash_attn_3",
    "flash_attention_4": "flash_attn_4",
}
_FLASH = tuple(name for name in PROVIDERS if name != "sdpa")


def is_right_padded(attention_mask: Tensor | None, attention: str, known: bool | None = None) -> bool | None:
    """Return True if all padding of a batch [B, L] comes last, None if the attention does not ask.

    Waits for the device, as transformers does too to see if there is padding, unless it is known.
    """
    if attention not in _FLASH or attention_mask is None or attention_mask.ndim != 2:
        return None
    return known if known is not None else bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def choose_options(
    attention: str, query: Tensor, attention_mask: Tensor | None, kwargs: dict, provider: str = "auto"
) -> dict:
    """Return the options with which `flash_noun_attention` does what a layer's attention does.

    Args:
        attention: the layer's own, as transformers calls it.
        query: [B, Hq, L, D].
        attention_mask: as that attention gets it: bool [B, 1, L, L] for "sdpa", bool [B, L] for flash attention.
        kwargs: what else it gets.
        provider: for "sdpa", which is several attentions.

    Raises:
        Unsupported: there are none.
    """
    if attention not in PROVIDERS:
        raise Unsupported(f"there is no provider for the attention {attention!r}")
    if kwargs.get("dropout"):
        raise Unsupported("the attention has dropout")
    if kwargs.get("is_causal") is False:  # None: as the module says, which a decoder's says
        raise Unsupported("the attention is not causal")
    options = {"provider": provider if attention == "sdpa" else PROVIDERS[attention]}
    if attention == "sdpa":
        return options | {"mask": attention_mask}  # a window and packed sequences are part of it
    window = kwargs.get("sliding_window")
    if window is not None and query.shape[2] > window:
        options["window"] = window
    if attention_mask is not None:  # what comes behind a causal token does not concern it
        if not kwargs.get("right_padded"):
            raise Unsupported("the batch is padded on the left")
    elif kwargs.get("cu_seq_lens_q") is not None:
        options |= {"cu_seqlens": kwargs["cu_seq_lens_q"], "max_length": kwargs.get("max_length_q")}
    elif len(query) == 1 and _restarts(kwargs.get("position_ids")):
        raise Unsupported(
            "sequences are packed by position ids alone: give cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k"
        )
    return options


def _restarts(position_ids: Tensor | None) -> bool:
    """Return True if position ids [1, L] belong to several sequences, to which flash attention restricts itself."""
    return position_ids is not None and bool((position_ids.diff() != 1).any())


def describe_provider(provider: str, query: Tensor) -> str:
    """Return the name of a provider, and what `sdpa` would have taken where that is another."""
    if provider != "auto" or query.device.type != "cuda":
        return provider
    if torch.cuda.get_device_capability(query.device)[0] == 9 and torch.backends.cuda.cudnn_sdp_enabled():
        return "auto: torch_cuda; sdpa by itself may take cuDNN here, as attention_loss.provider=torch_cudnn does"
    return "auto: torch_cuda"


def log_choice(attention: str, device: torch.device, choice: str) -> None:
    """Log how the maps of a layer are computed, once per process for every choice."""
    if not torch.compiler.is_compiling():
        _log_once(attention, device.type, choice)


@functools.cache
def _log_once(attention: str, device_type: str, choice: str) -> None:
    logger.info("noun maps behind %s on %s: %s", attention, device_type, choice)
