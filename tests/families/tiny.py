"""Tiny models and processors of the supported families: stock classes, random weights, a tokenizer of a few words."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch

from tests.families.tiny_parts import Tiny, model_of, template, text_config, tokenizer_with
from tests.families.tiny_qwen import omni, qwen


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
    "Qwen2-VL": functools.partial(qwen, "Qwen2VL"),
    "Qwen2.5-VL": functools.partial(qwen, "Qwen2_5_VL"),
    "Qwen3-VL": functools.partial(qwen, "Qwen3VL"),
    "Qwen3-VL MoE": functools.partial(qwen, "Qwen3VLMoe"),
    "Qwen2.5-Omni": functools.partial(omni, "Qwen2_5Omni"),
    "Qwen3-Omni": functools.partial(omni, "Qwen3OmniMoe"),
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
