"""Paths of the parts of each supported model family.

A family is one entry of `FAMILIES`. Nothing else in the project names a module of a model.
"""

from dataclasses import dataclass

from torch import nn

from swim_fast.errors import UserError


class UnsupportedModelError(UserError, ValueError):
    """A model without an entry in `FAMILIES`, or one that was loaded without its language-model head."""


@dataclass(frozen=True)
class Family:
    """Dotted paths below the `…ForConditionalGeneration` model of one `config.model_type`."""

    numbering: str  # has `get_rope_index`, which numbers the tokens
    language_model: str  # decoder stack: has `.layers`, collects `outputs.attentions`
    attention: str  # self-attention inside one decoder layer
    visual: str  # called with (pixel values, grid_thw=…)
    merger: str  # projects visual features to the language model's width
    head: str  # language-model head


FAMILIES = {
    "qwen2_5_vl": Family(
        numbering="model",
        language_model="model.language_model",
        attention="self_attn",
        visual="model.visual",
        merger="model.visual.merger",
        head="lm_head",
    ),
}


def get_family(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedModelError: no entry for this `config.model_type`, or not the model with the language-model head.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"no adapter for model type {model_type!r}; supported: {', '.join(sorted(FAMILIES))}. "
            "An adapter is one entry of swim_fast.modeling.families.FAMILIES."
        )
    family = FAMILIES[model_type]
    try:
        model.get_submodule(family.language_model)
        model.get_submodule(family.head)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {family.language_model!r} and {family.head!r}: "
            "load it with AutoModelForImageTextToText.from_pretrained"
        ) from error
    return family


def get_attentions(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention modules of the decoder layers, first to last."""
    family = get_family(model)
    layers = model.get_submodule(family.language_model).layers
    return [layer.get_submodule(family.attention) for layer in layers]


def get_head_dim(text_config) -> int:
    """Return the head size of a text configuration, which may leave it to follow from the width."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def get_default_layers(num_layers: int) -> list[int]:
    """Return every fifth layer counted back from the last: 2, 7, …, 27 of 28 as in the paper (arXiv 2605.18018)."""
    return list(range((num_layers - 1) % 5, num_layers, 5))
