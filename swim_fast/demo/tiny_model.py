"""A tiny Qwen2.5-VL checkpoint folder: everything the real one has, at a size that trains on a CPU.

The folder is what `save_pretrained` of the stock transformers classes writes, so `AutoProcessor` and
`AutoModelForImageTextToText` load it, and whatever trains on it trains on a published Qwen2.5-VL by its path alone. The
weights are random; the tokenizer is a real byte-level BPE, trained on the texts handed in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from swim_fast.errors import OptionError

# In the order of Qwen2.5-VL's vocabulary, where they follow the learnt tokens.
_SPECIAL = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end
    vision_start vision_end vision_pad image_pad video_pad"""
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _SPECIAL.split())

SYSTEM_PROMPT = "You are a helpful assistant."

# Renders system, user and assistant turns as Qwen2.5-VL's template does, the optional "Picture 1: " labels included.
# A conversation's rendering starts with that of its first turns: a turn's tokens can be found by rendering twice.
CHAT_TEMPLATE = """\
{%- set counts = namespace(image=0, video=0) -%}
{%- macro media(kind, label, number) -%}
    {{- label ~ ' ' ~ number ~ ': ' if add_vision_id }}
    {{- '<|vision_start|><|' ~ kind ~ '_pad|><|vision_end|>' }}
{%- endmacro -%}
{%- if messages and messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nSYSTEM_PROMPT<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- set counts.image = counts.image + 1 %}
                {{- media('image', 'Picture', counts.image) }}
            {%- elif part.type == 'video' or 'video' in part %}
                {%- set counts.video = counts.video + 1 %}
                {{- media('video', 'Video', counts.video) }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".replace("SYSTEM_PROMPT", SYSTEM_PROMPT)


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the model and of its pictures; the defaults give about 0.75 M parameters with 400 tokens.

    A visual token covers a square of two frames, `patch_size * merge_size` pixels wide. Videos and images are resized
    to multiples of that, with `min_pixels` to `max_pixels` per frame.
    """

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    num_key_value_heads: int = 2
    vision_hidden_size: int = 64
    vision_intermediate_size: int = 128
    vision_depth: int = 2
    vision_num_heads: int = 4
    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 28 * 28
    max_pixels: int = 224 * 224
    rope_theta: float = 1e4
    initializer_range: float = 0.1
    tokens_per_second: int = 2


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Any:
    """Train a byte-level BPE with Qwen2's normalisation and pre-tokenisation; any string can be encoded.

    Args:
        texts: what merges are learnt from.
        vocab_size: learnt tokens, the 256 bytes included and the special tokens not; fewer if the texts run out of
            pairs that occur twice.

    Returns:
        A `Qwen2Tokenizer` (fast, with character offsets) whose special tokens are Qwen2.5-VL's.

    Raises:
        OptionError: `vocab_size` is below 256.
    """
    from tokenizers import pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    if vocab_size < 256:
        raise OptionError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least the 256 bytes")
    untrained = Qwen2Tokenizer().backend_tokenizer  # brings the normaliser and the pre-tokeniser
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    untrained.train_from_iterator(texts, trainer)
    learnt = json.loads(untrained.to_str())["model"]
    vocab = learnt["vocab"]
    for token in SPECIAL_TOKENS:
        vocab[token] = len(vocab)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


DEFAULTS = ModelSize()


def build_processor(tokenizer: Any, size: ModelSize = DEFAULTS) -> Any:
    """Build a Qwen2_5_VLProcessor with the chat template, and image and video processors of this size."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    patches = {"patch_size": size.patch_size, "merge_size": size.merge_size, "temporal_patch_size": 2}
    pixels = {"shortest_edge": size.min_pixels, "longest_edge": size.max_pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(pixels), **patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(pixels), cap_pixels_per_frame=False, **patches),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: Any, size: ModelSize = DEFAULTS) -> Any:
    """Build a Qwen2_5_VLConfig of this size whose token ids are the tokenizer's.

    Raises:
        OptionError: `hidden_size / num_heads` is no multiple of 16: rotary frequencies are dealt out to time, height
            and width as 2 : 3 : 3, as in Qwen2.5-VL.
    """
    from transformers import Qwen2_5_VLConfig

    head_dim, rest = divmod(size.hidden_size, size.num_heads)
    if rest or head_dim % 16:
        raise OptionError(
            f"hidden_size {size.hidden_size} over num_heads {size.num_heads} gives a head size of "
            f"{size.hidden_size / size.num_heads:g}; it must be a multiple of 16"
        )
    token_ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size.hidden_size,
            "intermediate_size": size.intermediate_size,
            "num_hidden_layers": size.num_layers,
            "num_attention_heads": size.num_heads,
            "num_key_value_heads": size.num_key_value_heads,
            "max_position_embeddings": tokenizer.model_max_length,
            "initializer_range": size.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": size.rope_theta,
                "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
            },
            "bos_token_id": token_ids["<|endoftext|>"],
            "eos_token_id": token_ids["<|im_end|>"],
            "pad_token_id": token_ids["<|endoftext|>"],
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": size.vision_intermediate_size,
            "num_heads": size.vision_num_heads,
            "out_hidden_size": size.hidden_size,
            "patch_size": size.patch_size,
            "spatial_merge_size": size.merge_size,
            "temporal_patch_size": 2,
            "tokens_per_second": size.tokens_per_second,
            "window_size": 8 * size.patch_size * size.merge_size,
            "fullatt_block_indexes": [size.vision_depth - 1],
            "initializer_range": size.initializer_range,
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_model(tokenizer: Any, size: ModelSize = DEFAULTS, *, seed: int) -> Any:
    """Build a random fp32 Qwen2_5_VLForConditionalGeneration; the caller's random state is left as it was."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, size))
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=False
    )
    return model.eval()


def build_checkpoint(
    folder: str | PathLike[str],
    texts: Iterable[str],
    *,
    seed: int,
    vocab_size: int = 512,
    size: ModelSize = DEFAULTS,
) -> Path:
    """Write a checkpoint folder with tokenizer, processor, configuration and random weights; same seed, same files.

    Args:
        folder: made if absent; files of the same names are replaced.
        texts: what the tokenizer learns from: the conversations without their tags.
        seed: of the weights.
        vocab_size: as for `train_tokenizer`.
        size: of the model and its pictures.
    """
    folder = Path(folder)
    tokenizer = train_tokenizer([*texts, f"system\n{SYSTEM_PROMPT}", "user\n", "assistant\n"] * 2, vocab_size)
    build_processor(tokenizer, size).save_pretrained(folder)
    build_model(tokenizer, size, seed=seed).save_pretrained(folder)
    return folder
