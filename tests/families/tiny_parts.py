"""Parts of tiny models and processors: a tokenizer of a few words, chat templates, configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from swim_fast.demo.tiny_model import train_tokenizer

TEXTS = (
    "What is the dog on the left doing? The brown dog runs after the ball.",
    "Describe the red ball. The red ball rolls to the right and stops at the wall.",
    "system\nYou are a helpful assistant. user\n assistant\n <0.5 seconds> Frame1: Time 1.5s: 00:01",
)
TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "max_position_embeddings": 4096}
# The chat templates of most families differ in what they write for a picture alone.
TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- for part in message.content %}
        {%- if part.type in pictures %}{{- pictures[part.type] }}{% else %}{{- part.text }}{% endif %}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


class Tiny(NamedTuple):
    """A family's processor and a function that builds its model, the same weights every time."""

    processor: Any
    build: Callable[[], Any]


def template(image: str, video: str | None = None) -> str:
    """Return a chat template that writes these texts for an image and a video."""
    pictures = {"image": image} | ({"video": video} if video else {})
    return f"{{%- set pictures = {pictures!r} -%}}\n{TEMPLATE}"


def tokenizer_with(tokens: dict[str, str], more: tuple[str, ...] = ()) -> Any:
    """Return the tokenizer with further special tokens: by attribute, such as `image_token`, and without one."""
    tokenizer = train_tokenizer(TEXTS * 2, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens.values(), *more]}, False)
    tokenizer._set_model_specific_special_tokens(tokens)  # which a file names, too
    return tokenizer


def model_of(model_class: type, config: Any) -> Callable[[], Any]:
    """Return a function that builds a model in fp32, with the same weights every time."""

    def build():
        torch.manual_seed(0)
        return model_class._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()

    return build


def text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Return the configuration of a tiny decoder."""
    eos, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": eos, "pad_token_id": pad, **more}
