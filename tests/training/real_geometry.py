"""Model folders of Qwen2.5-VL's geometry without weights: configuration, processor and a tokenizer of our own."""

import dataclasses
from pathlib import Path

from swim_fast.demo.tiny_model import ModelSize, build_config, build_processor, train_tokenizer

SIZE = ModelSize(
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
VOCABULARY = 152064
SMALL = dataclasses.replace(  # the 3B model
    SIZE, hidden_size=2048, intermediate_size=11008, num_layers=36, num_heads=16, num_key_value_heads=2
)
SMALL_VOCABULARY = 151936

# Counted by hand: Qwen2.5-VL-7B's published checkpoint has as many.
HEAD = VOCABULARY * 3584
LAYER = (
    3584 * 3584 + 3584  # query
    + 2 * (3584 * 512 + 512)  # key, value
    + 3584 * 3584  # output
    + 3 * 3584 * 18944  # MLP
    + 2 * 3584  # norms
)  # fmt: skip
LANGUAGE_MODEL = VOCABULARY * 3584 + 28 * LAYER + 3584
BLOCK = 3 * 1280 * 1280 + 3 * 1280 + 1280 * 1280 + 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
VISION_TOWER = 3 * 2 * 14 * 14 * 1280 + 32 * BLOCK
MERGER = 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
TOTAL = HEAD + LANGUAGE_MODEL + VISION_TOWER + MERGER
SMALL_LAYER = 2 * 2048 * 2048 + 2048 + 2 * (2048 * 256 + 256) + 3 * 2048 * 11008 + 2 * 2048
SMALL_MERGER = 1280 + 5120 * 5120 + 5120 + 5120 * 2048 + 2048
SMALL_TOTAL = SMALL_VOCABULARY * 2048 + 36 * SMALL_LAYER + 2048 + VISION_TOWER + SMALL_MERGER  # the head is tied


def write_folder(folder: Path, texts: list[str], *, small: bool = False) -> Path:
    """Write the 7B model's folder, or the 3B model's."""
    size = SMALL if small else SIZE
    tokenizer = train_tokenizer(texts, 300)
    build_processor(tokenizer, size).save_pretrained(folder)
    config = build_config(tokenizer, size)
    config.text_config.vocab_size = SMALL_VOCABULARY if small else VOCABULARY
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = small
    config.vision_config.window_size = 112
    config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    config.save_pretrained(folder)
    return folder
