"""Families of models that are supported: what the rest of the project must know of a model and its processor.

A family is one file here and one entry of `FAMILIES`; docs/families.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from swim_fast.errors import OptionError, ProcessorError
from swim_fast.families import gemma3, glm_v, internvl, llava, perception_lm, qwen_omni, qwen_vl, smolvlm, video_llama3
from swim_fast.families.base import Family, UnsupportedModelError, Vision, get_head_dim
from swim_fast.families.layout import Clip, VisualLayout

__all__ = [
    "FAMILIES",
    "Clip",
    "Family",
    "UnsupportedModelError",
    "Vision",
    "VisualLayout",
    "choose_layers",
    "find_family",
    "get_attentions",
    "get_default_layers",
    "get_eligible_layers",
    "get_family",
    "get_head_dim",
    "get_layout",
    "get_layout_class",
    "register_family",
]

FAMILIES: list[Family] = [
    *qwen_vl.FAMILIES,
    *qwen_omni.FAMILIES,
    *internvl.FAMILIES,
    *glm_v.FAMILIES,
    *video_llama3.FAMILIES,
    *llava.FAMILIES,
    *smolvlm.FAMILIES,
    *gemma3.FAMILIES,
    *perception_lm.FAMILIES,
]


def register_family(family: Family) -> None:
    """Add a family of one's own, in place of one of the same name, before models or samples of it are made."""
    FAMILIES[:] = [known for known in FAMILIES if known.name != family.name]
    FAMILIES.insert(0, family)


def find_family(config: Any) -> Family | None:
    """Return the family of a model's configuration; None if there is none."""
    model_type = getattr(config, "model_type", "")
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def get_family(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedModelError: none has this `config.model_type`, or not the model with the language-model head.
    """
    family = find_family(getattr(model, "config", None))
    if family is None:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        known = ", ".join(sorted({name for family in FAMILIES for name in family.model_types}))
        raise UnsupportedModelError(
            f"no adapter for model type {model_type!r}; supported: {known}. docs/families.md says how to write one"
        )
    try:
        model.get_submodule(family.language_model)
        model.get_submodule(family.head)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {family.language_model!r} and {family.head!r}: "
            "load it with AutoModelForImageTextToText.from_pretrained"
        ) from error
    return family


def get_layout_class(processor: Any) -> type[VisualLayout]:
    """Return how a processor's frames become tokens.

    Raises:
        ProcessorError: a processor of no family.
    """
    name = type(processor).__name__
    for family in FAMILIES:
        if name in family.processors:
            return family.layout
    known = ", ".join(sorted({name for family in FAMILIES for name in family.processors}))
    raise ProcessorError(
        f"where the visual tokens of {name} lie is not known; known are {known}. docs/families.md says how to add one"
    )


def get_layout(processor: Any, min_pixels: int | None = None, max_pixels: int | None = None) -> VisualLayout:
    """Return what a processor makes of frames.

    Raises:
        ProcessorError: a processor of no family, or limits that it cannot keep.
    """
    return get_layout_class(processor)(processor, min_pixels, max_pixels)


def get_attentions(model: nn.Module) -> list[nn.Module | None]:
    """Return the self-attention modules of the decoder layers, first to last; None for a layer without."""
    family = get_family(model)
    layers = model.get_submodule(family.language_model).layers
    return [getattr(layer, family.attention, None) for layer in layers]


def get_eligible_layers(model: nn.Module) -> list[int]:
    """Return the decoder layers whose attention sees the whole sequence, through a plain softmax.

    Left out are those of linear, chunked or sliding-window attention.
    """
    attentions = get_attentions(model)
    text = model.get_submodule(get_family(model).language_model).config
    types = getattr(text, "layer_types", None) or ["full_attention"] * len(attentions)
    return [i for i, module in enumerate(attentions) if module is not None and types[i] == "full_attention"]


def choose_layers(model: nn.Module, layers: list[int] | None) -> list[int]:
    """Return the chosen decoder layers, counted from 0.

    Args:
        layers: counted from 0, or negative from the end; None: `get_default_layers`.

    Raises:
        OptionError: a layer that is out of range, named twice, or not eligible.
    """
    count, eligible = len(get_attentions(model)), get_eligible_layers(model)
    if layers is None:
        return get_default_layers(eligible)
    for layer in layers:
        if not -count <= layer < count:
            raise OptionError(f"layer {layer} is out of range: the model has layers 0 … {count - 1}")
    chosen = [layer % count for layer in layers]
    if len(set(chosen)) != len(chosen):
        raise OptionError(f"layers {sorted(chosen)} name one layer twice")
    if other := sorted(set(chosen) - set(eligible)):
        raise OptionError(
            f"layer {other[0]} does not see the whole sequence (sliding-window or linear attention); choose of "
            f"{', '.join(map(str, eligible))}"
        )
    return chosen


def get_default_layers(eligible: Sequence[int]) -> list[int]:
    """Return every fifth layer counted back from the last: 2, 7, …, 27 of 28 as in the paper (arXiv 2605.18018).

    Where not all are eligible, the next one that is: of every sixth (Gemma 3), all.
    """
    chosen: list[int] = []
    for layer in sorted(eligible, reverse=True):
        if not chosen or chosen[-1] - layer >= 5:
            chosen.append(layer)
    return chosen[::-1]
