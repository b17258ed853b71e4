"""Noun attention on an unmodified Hugging Face model.

`attach_noun_attention` points the decoder's self-attention modules at an attention function of our own, registered
under one name in transformers' `AttentionInterface`. It runs the model's own attention for the layer's output and, at
the chosen layers, returns the noun maps in place of the attention weights, which transformers collects in
`outputs.attentions`. Where one autograd node can give output and maps, it does (`fused_attention.py`).

Only this model instance changes: its attention modules get a copy of the text configuration that names our function.
The configuration that is saved, the weights and the mask construction stay as they were.
"""

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from swim_fast.errors import UserError
from swim_fast.families import UnsupportedModelError, choose_layers, get_attentions, get_family
from swim_fast.modeling import fused_attention
from swim_fast.modeling.attention_interface import get_attention, name_attention
from swim_fast.modeling.hooks import add_keyword_step, leave_out_cache, remove_context, remove_keyword_step
from swim_kernels import Unsupported, flash_noun_attention, noun_attention, noun_mass
from swim_kernels.runtime import to_autocast_dtype

ATTENTION_NAME = "swim_noun_attention"


class ReentrantCheckpointingError(UserError, ValueError):
    """Maps asked for under the kind of activation checkpointing that drops their gradient."""


@dataclasses.dataclass
class _Attached:
    """State of one attention module, kept on it as `_noun_attention`."""

    config: object  # the module's own text configuration, which names the attention of its output
    backend: str | None  # None: this layer answers no map
    fused: bool  # output and map from one node, where that is possible
    provider: str  # of that node behind sdpa


class MapsAndMasses(NamedTuple):
    """Answer of a chosen layer that is asked for masses, too.

    Attributes:
        maps: [R, N] fp32; None without noun queries.
        masses: [R', Hq, S] fp32, of `swim_kernels.noun_mass`.
    """

    maps: Tensor | None
    masses: Tensor


def noun_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    noun_queries=None,
    right_padded=None,
    mass_queries=None,
    mass_sets=None,
    **kwargs,
):
    """Attention function of an attached layer: its own output, and its noun map if there are queries.

    Args:
        query: `[B, Hq, L, D]` after rotary embedding; `key`, `value`: `[B, Hkv, L, D]`.
        noun_queries: `NounQueries` or None.
        right_padded: from `fused_attention.is_right_padded`, for the whole batch.
        mass_queries, mass_sets: rows and sets of keys of `swim_kernels.noun_mass`, or None.

    Returns:
        The wrapped attention's output `[B, L, Hq, D]`, and the map `[R, N]` fp32 (`MapsAndMasses` with mass queries;
        None at layers that were not chosen; the wrapped attention's own weights without any queries).
    """
    attached = module._noun_attention
    name = attached.config._attn_implementation
    wrapped = functools.partial(get_attention(module, attached.config), query, key, value, attention_mask)
    if noun_queries is None and mass_queries is None:
        return wrapped(**kwargs)
    kwargs.pop("output_attentions", None)  # it asks for the maps here, not for the wrapped attention's weights
    if attached.backend is None:
        return wrapped(**kwargs)[0], None
    _refuse_other_softmax(module, kwargs)
    if mass_queries is not None:
        how = {"scale": kwargs.get("scaling"), "backend": attached.backend}
        masses = noun_mass(*to_autocast_dtype(query, key), mass_queries, mass_sets, **how)
        if noun_queries is None:
            return wrapped(**kwargs)[0], MapsAndMasses(None, masses)
        about = kwargs | {"right_padded": right_padded}
        output, maps = noun_attention_forward(module, query, key, value, attention_mask, noun_queries, **about)
        return output, MapsAndMasses(maps, masses)
    if kwargs.get("sliding_window") is not None:
        noun_queries = noun_queries.within_window(kwargs["sliding_window"])
    how = {"scale": kwargs.get("scaling"), "backend": attached.backend}
    try:
        if not attached.fused:
            raise Unsupported("asked for")
        about = kwargs | {"right_padded": right_padded}
        options = fused_attention.choose_options(name, query, attention_mask, about, attached.provider)
        output, maps = flash_noun_attention(query, key, value, noun_queries, **how, **options)
    except Unsupported as reason:
        fused_attention.log_choice(name, query.device, f"an op of their own ({reason})")
        output = wrapped(**kwargs)[0]
        return output, noun_attention(*to_autocast_dtype(query, key), noun_queries, **how)
    provider = fused_attention.describe_provider(options["provider"], query)
    fused_attention.log_choice(name, query.device, f"one node with the attention ({provider})")
    output = output.transpose(1, 2).contiguous()
    if right_padded and attention_mask is not None:  # flash attention leaves zeros there
        output = output.masked_fill(~attention_mask.bool()[:, :, None, None], 0.0)
    return output, maps


_OTHER_SOFTMAX = {  # of transformers' attention functions and modules: argument or attribute
    "softcap": "a cap on the scores",
    "s_aux": "sinks",
    "sinks": "sinks",
    "position_bias": "a bias by position",
    "is_causal": "no causal mask",
}


def _refuse_other_softmax(module: nn.Module, kwargs: dict) -> None:
    """Raise UnsupportedModelError if a layer's probabilities are not those of its scores alone (SPEC, families)."""
    given = {name: kwargs.get(name, getattr(module, name, None)) for name in _OTHER_SOFTMAX}
    given["softcap"] = given["softcap"] or getattr(module, "attn_logit_softcapping", None)
    given["is_causal"] = True if given["is_causal"] is False else None
    found = [name for name, value in given.items() if value is not None]
    if found:
        raise UnsupportedModelError(
            f"{type(module).__name__} has {_OTHER_SOFTMAX[found[0]]} ({found[0]}), with which its attention is another "
            "than the noun maps': no maps of this model"
        )


AttentionInterface.register(ATTENTION_NAME, noun_attention_forward)


def _is_reentrant(layer: nn.Module) -> bool:
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return False
    function = layer._gradient_checkpointing_func
    return getattr(function, "keywords", {}).get("use_reentrant", False) is not False


_QUERIES = ("noun_queries", "mass_queries", "mass_sets")


def _ask_for_maps(language_model: nn.Module, kwargs: dict) -> dict:
    known = kwargs.pop("right_padded", None)
    if kwargs.get("noun_queries") is None and kwargs.get("mass_queries") is None:
        return {name: value for name, value in kwargs.items() if name not in _QUERIES}
    if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:  # its name from 5.24 on
        raise ValueError(
            "noun_queries cannot be used while generating (a key/value cache is in use): generate without them, then "
            "call model(**inputs, noun_queries=...) once on the whole sequence"
        )
    if torch.is_grad_enabled() and any(_is_reentrant(layer) for layer in language_model.layers):
        raise ReentrantCheckpointingError(
            "reentrant activation checkpointing drops the gradient of the noun maps: use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    attention = language_model.config._attn_implementation
    right_padded = fused_attention.is_right_padded(kwargs.get("attention_mask"), attention, known)
    return kwargs | {"output_attentions": True, "use_cache": False, "right_padded": right_padded}


def attach_noun_attention(
    model: nn.Module,
    layers: list[int] | None = None,
    backend: str = "auto",
    fused: bool = True,
    provider: str = "auto",
) -> nn.Module:
    """Make `model(**inputs, noun_queries=...)` answer noun maps in `outputs.attentions`.

    `right_padded=True` beside the queries says that no sequence begins with padding; without it, flash attention has to
    look, which waits for the device.

    Args:
        model: a stock `…ForConditionalGeneration` of a supported family, with any attention implementation.
        layers: decoder layers that answer a map, counted from 0 (negative: from the end). None: every fifth counted
            back from the last, as in the paper (2, 7, 12, 17, 22, 27 of 28; SWIM, arXiv 2605.18018).
        backend: of `swim_kernels.noun_attention`.
        fused: compute a layer's output and map in one autograd node (`swim_kernels.flash_noun_attention`) where its
            attention allows it: the same results and gradients for less memory. The log says which it is, and why.
            False: always separately.
        provider: of `swim_kernels.flash_noun_attention`, for that node where the attention is sdpa.

    Returns:
        The same model. With `noun_queries`, `outputs.attentions` is a tuple of one fp32 map `[R, N]` per chosen layer,
        in layer order; without, the model behaves as before. With `mass_queries` and `mass_sets`, see
        `swim_kernels.noun_mass`, it is `MapsAndMasses` of each layer. Attaching again replaces the choice of layers.

    Raises:
        UnsupportedModelError: no entry for the model's family, or an attention of another softmax than maps are of.
        OptionError: a layer that is out of range, named twice, or does not see the whole sequence.
        ValueError: at the forward: reentrant activation checkpointing (`ReentrantCheckpointingError`), or noun queries
            while generating.
    """
    attentions, chosen = get_attentions(model), choose_layers(model, layers)
    for layer in chosen:
        _refuse_other_softmax(attentions[layer], {})

    detach_noun_attention(model)
    config = name_attention(model.get_submodule(get_family(model).language_model).config, ATTENTION_NAME)
    for index, module in enumerate(attentions):
        if module is None:
            continue
        module._noun_attention = _Attached(module.config, backend if index in chosen else None, fused, provider)
        module.config = config
    add_keyword_step(model, "noun_attention", _ask_for_maps)
    leave_out_cache(model, "noun_attention", "noun_queries")
    return model


def detach_noun_attention(model: nn.Module) -> nn.Module:
    """Undo `attach_noun_attention`; does nothing to a model that is not attached. Returns the same model."""
    for module in get_attentions(model):
        if hasattr(module, "_noun_attention"):
            module.config = module._noun_attention.config
            del module._noun_attention
    remove_keyword_step(model, "noun_attention")
    remove_context(model, "noun_attention")
    return model


def get_attached_layers(model: nn.Module) -> list[int]:
    """Return the layers that answer noun maps, in order; none for a model that is not attached."""
    states = [getattr(module, "_noun_attention", None) for module in get_attentions(model)]
    return [index for index, state in enumerate(states) if state and state.backend]
