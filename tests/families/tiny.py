"""Tiny models and processors of the supported families: stock classes, random weights, a tokenizer of a few words."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from swim_fast.demo.tiny_model import CHAT_TEMPLATE, train_tokenizer

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


def _qwen(family: str) -> Tiny:
    import transformers

    tokenizer = train_tokenizer(TEXTS * 2, 400)
    names = "image_pad", "video_pad", "vision_start", "vision_end"
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    third = family.startswith("Qwen3VL")
    patch = 16 if third else 14
    layout = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    factor = 2 * patch
    size = {"shortest_edge": 4 * factor**2, "longest_edge": 24 * factor**2}
    video = transformers.Qwen3VLVideoProcessor if third else transformers.Qwen2VLVideoProcessor
    processor = getattr(transformers, f"{'Qwen3VL' if third else family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(size=dict(size), **layout),
        tokenizer=tokenizer,
        video_processor=video(size={k: v * (4 if third else 1) for k, v in size.items()}, **layout),
        chat_template=CHAT_TEMPLATE,
    )
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": patch, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2, "in_channels": 3, "initializer_range": 0.1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = text_config(tokenizer, rope_parameters=rope)
    if family == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"intermediate_size": 32, "out_hidden_size": 64}
    if family == "Qwen2_5_VL":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    if third:
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        rope["mrope_interleaved"] = True
    if family == "Qwen3VLMoe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    return Tiny(processor, model_of(getattr(transformers, f"{family}ForConditionalGeneration"), config))


def _internvl() -> Tiny:
    import transformers

    tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tokenizer_with(tokens | {"video_token": "<video>"})
    size, mean = {"height": 56, "width": 56}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=dict(size), max_patches=6, **mean),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size=dict(size), **mean),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config={**vision, "image_size": 56, "patch_size": 14},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return Tiny(processor, model_of(transformers.InternVLForConditionalGeneration, config))


def _glm(family: str) -> Tiny:
    import transformers

    tokens = {"image_token": "<|image|>", "video_token": "<|video|>"}
    around = [f"<|{side}_of_{kind}|>" for kind in ("image", "video") for side in ("begin", "end")]
    tokenizer = tokenizer_with(tokens, tuple(around))
    ids = tokenizer.convert_tokens_to_ids(around)
    kind = "Glm46V" if family == "Glm46V" else "Glm4v"
    layout = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 8 * 28**2, "longest_edge": 48 * 28**2}
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=getattr(transformers, f"{kind}ImageProcessor")(size=dict(size), **layout),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, f"{kind}VideoProcessor")(
            size=size | {"longest_edge": 100 * 28**2}, **layout
        ),
        chat_template=template(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
        ),
    )
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 32}
    vision |= {"image_size": 56, "patch_size": 14, "initializer_range": 0.1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    text = text_config(tokenizer, rope_parameters=rope)
    if family == "Glm4vMoe":
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
        text |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_start_token_id=ids[0],
        image_end_token_id=ids[1],
        video_start_token_id=ids[2],
        video_end_token_id=ids[3],
        tie_word_embeddings=False,
    )
    return Tiny(processor, model_of(getattr(transformers, f"{family}ForConditionalGeneration"), config))


def _video_llama3() -> Tiny:
    import transformers

    tokenizer = tokenizer_with({"image_token": "<image>", "video_token": "<video>"})
    size = {"shortest_edge": 4 * 28**2, "longest_edge": 24 * 28**2}
    processor = transformers.VideoLlama3Processor(
        image_processor=transformers.VideoLlama3ImageProcessor(size=dict(size)),
        tokenizer=tokenizer,
        video_processor=transformers.VideoLlama3VideoProcessor(size=size | {"longest_edge": 80 * 28**2}),
        chat_template=template("<image>\n", "<video>\n"),
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.VideoLlama3Config(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config={**vision, "patch_size": 14, "initializer_range": 0.1},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        tie_word_embeddings=False,
    )
    return Tiny(processor, model_of(transformers.VideoLlama3ForConditionalGeneration, config))


def _omni(family: str) -> Tiny:
    import transformers

    names = ("image", "video", "audio")
    tokens = {f"{name}_token": f"<|{name.upper()}|>" for name in names}
    tokens |= {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")}
    tokenizer = tokenizer_with(tokens)
    third = family == "Qwen3OmniMoe"
    patch = 16 if third else 14
    layout = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 4 * 4 * patch**2, "longest_edge": 24 * 4 * patch**2}
    features = transformers.WhisperFeatureExtractor(feature_size=16)
    processor = getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(size=dict(size), **layout),
        video_processor=transformers.Qwen2VLVideoProcessor(size=dict(size), **layout),
        feature_extractor=features,
        tokenizer=tokenizer,
        chat_template=template(*(f"<|vision_bos|><|{name.upper()}|><|vision_eos|>" for name in names[:2])),
    )
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": patch, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2, "in_channels": 3, "initializer_range": 0.1, "out_hidden_size": 64}
    vision |= {"intermediate_size": 32}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    audio |= {"num_mel_bins": 16, "output_dim": 64, "max_source_positions": 100}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = text_config(tokenizer, rope_parameters=rope)
    if third:
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        rope["mrope_interleaved"] = True
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
        audio |= {"downsample_hidden_size": 16}
        more = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name.upper()}|>") for name in names}
    else:
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        more = {f"{name}_token_index": tokenizer.convert_tokens_to_ids(f"<|{name.upper()}|>") for name in names}
    for kind in ("audio", "vision"):
        more[f"{kind}_start_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{kind}_bos|>")
    config = getattr(transformers, f"{family}ThinkerConfig")(
        text_config=text, vision_config=vision, audio_config=audio, tie_word_embeddings=False, **more
    )
    return Tiny(processor, model_of(getattr(transformers, f"{family}ThinkerForConditionalGeneration"), config))


def _llava_onevision() -> Tiny:
    import transformers

    tokenizer = tokenizer_with({"image_token": "<image>", "video_token": "<video>"})
    size, tiles = {"height": 70, "width": 70}, [[70 * rows, 70 * columns] for rows in (1, 2) for columns in (1, 2, 3)]
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=dict(size), image_grid_pinpoints=tiles),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=dict(size)),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
        chat_template=template("<image>\n", "<video>\n"),
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **vision, "image_size": 70, "patch_size": 14}
        | {"vision_use_head": False},
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=tiles,
        vision_aspect_ratio="anyres_max_3",
    )
    return Tiny(processor, model_of(transformers.LlavaOnevisionForConditionalGeneration, config))


def _llava_next_video() -> Tiny:
    import transformers

    tokenizer = tokenizer_with({"image_token": "<image>", "video_token": "<video>"})
    size, crop = {"shortest_edge": 56}, {"height": 56, "width": 56}
    tiles = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    processor = transformers.LlavaNextVideoProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size=dict(size), crop_size=dict(crop), image_grid_pinpoints=tiles
        ),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaNextVideoVideoProcessor(size=dict(size), crop_size=dict(crop)),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n", "<video>\n"),
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaNextVideoConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 56, "patch_size": 14},
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=tiles,
    )
    return Tiny(processor, model_of(transformers.LlavaNextVideoForConditionalGeneration, config))


def _smolvlm() -> Tiny:
    import transformers
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    tokens = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    tokens |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer = tokenizer_with(tokens, tuple(tiles))
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**copy.deepcopy(sizes)),
        tokenizer=tokenizer,
        video_processor=transformers.SmolVLMVideoProcessor(**copy.deepcopy(sizes)),
        image_seq_len=4,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config={**vision, "image_size": 56, "patch_size": 14, "initializer_range": 0.1},
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    return Tiny(processor, model_of(transformers.SmolVLMForConditionalGeneration, config))


def _gemma3() -> Tiny:
    import transformers

    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizer_with(tokens)
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    layers = ["full_attention", "sliding_attention", "full_attention"]
    text = text_config(tokenizer, layer_types=layers, sliding_window=8, query_pre_attn_scalar=16)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 56, "patch_size": 14, "vision_use_head": False},
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )
    build = model_of(transformers.Gemma3ForConditionalGeneration, config)

    def with_projection():
        model = build()  # whose projection is zero at first
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
        return model

    return Tiny(processor, with_projection)


def _perception_lm() -> Tiny:
    import transformers

    tokenizer = tokenizer_with({"image_token": "<|image|>", "video_token": "<|video|>"})
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = transformers.PerceptionLMProcessor(
        image_processor=transformers.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=4, **mean),
        tokenizer=tokenizer,
        video_processor=transformers.PerceptionLMVideoProcessor(size={"height": 56, "width": 56}, **mean),
        patch_size=14,
        pooling_ratio=2,
        chat_template=template("<|image|>", "<|video|>"),
    )
    tower = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [56, 56], "ref_feat_shape": [4, 4]}
    tower |= {"global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1}
    config = transformers.PerceptionLMConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config={"architecture": "vit_pe_core_large_patch14_336", "model_args": tower},
        projector_pooling_ratio=2,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        tie_word_embeddings=False,
    )
    return Tiny(processor, model_of(transformers.PerceptionLMForConditionalGeneration, config))


MAKERS: dict[str, Callable[[], Tiny]] = {
    "Qwen2-VL": functools.partial(_qwen, "Qwen2VL"),
    "Qwen2.5-VL": functools.partial(_qwen, "Qwen2_5_VL"),
    "Qwen3-VL": functools.partial(_qwen, "Qwen3VL"),
    "Qwen3-VL MoE": functools.partial(_qwen, "Qwen3VLMoe"),
    "Qwen2.5-Omni": functools.partial(_omni, "Qwen2_5Omni"),
    "Qwen3-Omni": functools.partial(_omni, "Qwen3OmniMoe"),
    "InternVL": _internvl,
    "GLM-4.1V": functools.partial(_glm, "Glm4v"),
    "GLM-4.5V": functools.partial(_glm, "Glm4vMoe"),
    "GLM-4.6V": functools.partial(_glm, "Glm46V"),
    "VideoLLaMA3": _video_llama3,
    "LLaVA-OneVision": _llava_onevision,
    "LLaVA-NeXT-Video": _llava_next_video,
    "SmolVLM2": _smolvlm,
    "Gemma 3": _gemma3,
    "Perception-LM": _perception_lm,
}


# Packages that the processor or the model of a family needs beside transformers.
NEEDS = {"SmolVLM2": "num2words", "Perception-LM": "timm"}


@functools.cache
def tiny(name: str) -> Tiny:
    """Return the tiny processor and model of a family."""
    return MAKERS[name]()
