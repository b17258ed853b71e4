"""A tiny real processor and model, and records written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.records import Record, Turn
from swim_fast.options import Decoding, Sampling, Supervision
from tests.helpers.clips import numbered_frames, write_clip

TEXTS = (
    "What is the dog on the left doing? The brown dog runs after the ball.",
    "Describe the red ball. The red ball rolls to the right and stops at the wall.",
    "Which of the two cups moves first? The blue cup moves first, then the white cup.",
)


@pytest.fixture(scope="session")
def tokenizer():
    from swim_fast.demo.tiny_model import train_tokenizer

    return train_tokenizer([*TEXTS, "system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 2, 400)


@pytest.fixture(scope="session")
def processor(tokenizer):
    """Qwen2.5-VL's processor; a visual token is 28 × 28 pixels of two frames."""
    from swim_fast.demo.tiny_model import build_processor

    return build_processor(tokenizer)


@pytest.fixture(scope="session")
def model(tokenizer):
    """A random Qwen2.5-VL of two layers, in fp32."""
    from swim_fast.demo.tiny_model import ModelSize, build_model

    size = ModelSize(
        hidden_size=64, intermediate_size=64, num_layers=2, vision_hidden_size=32, vision_intermediate_size=32
    )
    return build_model(tokenizer, size, seed=0)


@pytest.fixture
def make_record():
    """Record(turns as "user", "assistant", "user", … texts; a first (role, text) pair keeps its own role)."""

    def make(*texts, kind="text", media=None, objects=(), source="file.jsonl", number=3, name="name") -> Record:
        turns = []
        for text in texts:
            role = "assistant" if turns and turns[-1].role == "user" else "user"
            turns.append(Turn(*text) if isinstance(text, tuple) else Turn(role, text))
        return Record(source, number, name, tuple(turns), kind, media, tuple(objects))

    return make


def box(height: int, width: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """A mask, uint8 [height, width], of one rectangle."""
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def rle(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length code of a mask: runs down the columns, the first one of zeros."""
    flat = mask.T.flatten()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """clip(count, fps=4, height=64, width=96): path of an H.264 file whose frames show their own number."""
    folder = tmp_path_factory.mktemp("clips")

    def make(count: int, fps: float = 4, height: int = 64, width: int = 96) -> Path:
        path = folder / f"{count}_{fps:g}_{height}_{width}.mp4"
        if not path.exists():
            write_clip(path, numbered_frames(count, height, width), fps)
        return path

    return make


def builder_of(processor, share=None, **options) -> SampleBuilder:
    """A builder with options of any of the three kinds."""
    kinds = (Sampling, Decoding, Supervision)
    assert set(options) <= {name for kind in kinds for name in kind.model_fields}
    made = (kind(**{name: options[name] for name in kind.model_fields if name in options}) for kind in kinds)
    return SampleBuilder(processor, *made, share)
