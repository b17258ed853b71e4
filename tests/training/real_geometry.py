"""Model folders of Qwen2.5-VL's geometry without weights: configuration, processor and a tokenizer of our own."""

from pathlib import Path

from benchmarks.geometries import PUBLISHED, build_published_config
from swim_fast.demo.tiny_model import build_processor, train_tokenizer

# Counted by hand: Qwen2.5-VL-7B's published checkpoint has as many.
HEAD = 152064 * 3584
LAYER = (
    3584 * 3584 + 3584  # query
    + 2 * (3584 * 512 + 512)  # key, value
    + 3584 * 3584  # output
    + 3 * 3584 * 18944  # MLP
    + 2 * 3584  # norms
)  # fmt: skip
LANGUAGE_MODEL = 152064 * 3584 + 28 * LAYER + 3584
BLOCK = 3 * 1280 * 1280 + 3 * 1280 + 1280 * 1280 + 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
VISION_TOWER = 3 * 2 * 14 * 14 * 1280 + 32 * BLOCK
MERGER = 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
TOTAL = HEAD + LANGUAGE_MODEL + VISION_TOWER + MERGER
SMALL_LAYER = 2 * 2048 * 2048 + 2048 + 2 * (2048 * 256 + 256) + 3 * 2048 * 11008 + 2 * 2048
SMALL_MERGER = 1280 + 5120 * 5120 + 5120 + 5120 * 2048 + 2048
SMALL_TOTAL = 151936 * 2048 + 36 * SMALL_LAYER + 2048 + VISION_TOWER + SMALL_MERGER  # the head is tied


def write_folder(folder: Path, texts: list[str], name: str = "Qwen2.5-VL-7B") -> Path:
    """Write the folder of a published model."""
    model, tokenizer = PUBLISHED[name], train_tokenizer(texts, 300)
    build_processor(tokenizer, model.size).save_pretrained(folder)
    build_published_config(tokenizer, model).save_pretrained(folder)
    return folder
