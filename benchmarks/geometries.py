"""Geometry of published Qwen2.5-VL models, by which they are built without their weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from swim_fast.demo.tiny_model import ModelSize, build_config


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        tied: the head's weights are those of the embeddings.
    """

    size: ModelSize
    vocabulary: int
    tied: bool


_SEVEN = ModelSize(
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_key_value_heads=4,
    vision_hidden_size=1280,
    vision_intermediate_size=3420,
    vision_depth=32,
    vision_num_heads=16,
    min_pixels=56 * 56,
    max_pixels=3584 * 3584,
)
_THREE = {"hidden_size": 2048, "intermediate_size": 11008, "num_layers": 36, "num_heads": 16, "num_key_value_heads": 2}
PUBLISHED = {
    "Qwen2.5-VL-7B": Published(_SEVEN, 152064, tied=False),
    "Qwen2.5-VL-3B": Published(dataclasses.replace(_SEVEN, **_THREE), 151936, tied=True),
}


def build_published_config(tokenizer: Any, model: Published) -> Any:
    """Return the configuration of a published model with the ids of another tokenizer."""
    config = build_config(tokenizer, model.size)
    config.text_config.vocab_size = model.vocabulary
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = model.tied
    config.vision_config.window_size = 112
    config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    return config
