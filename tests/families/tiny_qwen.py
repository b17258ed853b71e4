"""Tiny models and processors of the Qwen families."""

from __future__ import annotations

from swim_fast.demo.tiny_model import CHAT_TEMPLATE, train_tokenizer
from tests.families.tiny_parts import TEXTS, Tiny, model_of, template, text_config, tokenizer_with


def qwen(family: str) -> Tiny:
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


def omni(family: str) -> Tiny:
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
