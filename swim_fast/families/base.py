"""Families of models: where the parts of a model lie, and which layers have an attention that maps are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from swim_fast.errors import UserError
from swim_fast.families.layout import VisualLayout


class UnsupportedModelError(UserError, ValueError):
    """A model or processor of no family, one without its language-model head, or an attention of another softmax."""


@dataclass(frozen=True)
class Vision:
    """Sizes of a vision tower, for estimates of memory and operations.

    Attributes:
        hidden, depth, heads, intermediate: width, blocks, heads of a block and width of its MLP.
        patch_values: pixel values of a patch.
        patches_per_token: patches that become one token of the language model, on average.
        patches_per_cell: patches of a cell of `VisualLayout.tower_grids`, which is a row of the mergers' input; None:
            as many as of a token.
        full_blocks: blocks whose attention sees a whole frame; None: all.
        window: side of the windows of the others, in patches.
    """

    hidden: int
    depth: int
    heads: int
    intermediate: int
    patch_values: int
    patches_per_token: float
    full_blocks: int | None = None
    window: int = 1
    patches_per_cell: float | None = None

    @classmethod
    def from_config(cls, tower: Any, patches_per_token: float, patches_per_cell: float | None = None) -> Vision:
        """Return the sizes that the configuration of a tower of ViT's kind names."""
        side = tower.patch_size
        pixels = side**2 if isinstance(side, int) else math.prod(side)
        return cls(
            hidden=tower.hidden_size,
            depth=tower.num_hidden_layers,
            heads=tower.num_attention_heads,
            intermediate=tower.intermediate_size,
            patch_values=tower.num_channels * pixels,
            patches_per_token=patches_per_token,
            patches_per_cell=patches_per_cell,
        )


@dataclass(frozen=True)
class Family:
    """A family of models of transformers; paths are dotted ones below its `…ForConditionalGeneration`.

    Attributes:
        name: as it is known, for tables.
        model_types: `config.model_type` of its models.
        processors: classes of its processors.
        layout: what its processor makes of frames.
        language_model: decoder stack: has `.layers`, collects `outputs.attentions`.
        visual: vision tower, whose forward takes the pixels.
        mergers: what brings visual features to the language model's width, inside of `visual` or not.
        minimal_pass: (model) → features of the smallest input, on the model's device, for a batch without pixels.
        vision: (model's configuration) → sizes of the vision tower.
        attention: self-attention inside one decoder layer.
        head: language-model head.
        numbering: has `get_rope_index`, which numbers the tokens; None: they are counted.
        pretraining_rule: numbers follow the rule of `swim_fast.position_ids`.
        merger_parameters: paths of parameters that belong to the mergers and lie in none of these modules.
        unused: (model) → modules that no input of this project reaches, or that no output depends on; they are frozen.
        packable: several samples can be one sequence.
        frames_apart: the vision tower takes `grid_thw` and encodes each temporal patch by itself; the layout's
            `prepare` takes the frames of some patches alone.
        cacheless: a key/value cache is made before the decoder is called, so that it has to be told above to make none.
    """

    name: str
    model_types: tuple[str, ...]
    processors: tuple[str, ...]
    layout: type[VisualLayout]
    language_model: str
    visual: str
    mergers: tuple[str, ...]
    minimal_pass: Callable[[nn.Module], Tensor]
    vision: Callable[[Any], Vision]
    attention: str = "self_attn"
    head: str = "lm_head"
    numbering: str | None = None
    pretraining_rule: bool = False
    merger_parameters: tuple[str, ...] = ()
    unused: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()
    packable: bool = True
    frames_apart: bool = False
    cacheless: bool = False

    @property
    def embeds_part(self) -> bool:
        """True where ranks that share a sample can cut its tokens before they are embedded: positions come with it."""
        return self.frames_apart and self.numbering is not None


def get_head_dim(text_config: Any) -> int:
    """Return the head size of a text configuration, which may leave it to follow from the width."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
