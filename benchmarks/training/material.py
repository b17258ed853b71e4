"""Clips, records and checkpoints for the benchmark of training, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swim_fast.demo.clips import write_video
from swim_fast.demo.scenes import ClipOptions
from swim_fast.demo.tiny_model import ModelSize, build_checkpoint

TEXTS = ["Where does the square go?", "The square goes to the right and comes to rest.", "It is grey and bright."]
QUESTION = "Where does the <ins>square</ins> go? Is it <ins>grey</ins> and <ins>bright</ins>?"  # one object, three tags

TINY = ModelSize(num_layers=4, max_pixels=448 * 448)
LARGE = ModelSize(  # 0.1 B parameters, a fifth of them in the vision tower
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_heads=12,
    num_key_value_heads=4,
    vision_hidden_size=512,
    vision_intermediate_size=1368,
    vision_depth=6,
    vision_num_heads=8,
    max_pixels=448 * 448,
    initializer_range=0.02,
)
SIZES = {"tiny": TINY, "0.1 B": LARGE}


@dataclass(frozen=True)
class Clip:
    """A clip to be written: `frames` frames, of which every `every`-th carries a mask."""

    frames: int
    height: int = 448
    width: int = 448
    every: int = 4


def write_checkpoint(folder: Path, size: ModelSize) -> Path:
    """Random weights, and a tokenizer that learns from `TEXTS`; an existing one is left as it is."""
    return folder if (folder / "config.json").exists() else build_checkpoint(folder, TEXTS * 3, seed=0, size=size)


def write_records(path: Path, clips: Sequence[Clip], answers: Sequence[int] = (1,), text_every: int = 0) -> Path:
    """Clips of a square that moves over noise, and a record of each with answers of these many sentences.

    text_every: beside that, one record of text alone for so many others; 0: none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, clip in enumerate(clips):
        name = f"{path.stem}-{number}.mp4"
        annotation = _write_clip(path.parent / name, clip, seed=number)
        for sentences in answers:
            lines.append(_record(f"<video>\n{QUESTION}", sentences))
            lines[-1] |= {"video": name, "annotation": [annotation] * QUESTION.count("<ins>")}
            if text_every and len(lines) % (text_every + 1) == text_every:
                lines.append(_record("Where does the square go?", sentences))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _record(question: str, sentences: int) -> dict:
    answer = " ".join(TEXTS[1] for _ in range(sentences))
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _write_clip(path: Path, clip: Clip, seed: int) -> dict:
    """Write a clip; return its annotation, frame number -> segmentation."""
    from pycocotools import mask as coco

    random = np.random.default_rng(seed)
    height, width, side = clip.height, clip.width, min(clip.height, clip.width) // 3
    backdrop = random.integers(0, 160, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    backdrop = backdrop.repeat(8, 0).repeat(8, 1)[:height, :width]
    frames, annotation = np.empty((clip.frames, height, width, 3), dtype=np.uint8), {}
    for number in range(clip.frames):
        left = (width - side) * number // max(clip.frames - 1, 1)
        top = height // 3
        frames[number] = np.roll(backdrop, number, axis=1)
        frames[number, top : top + side, left : left + side] = 230
        if number % clip.every == 0:
            mask = np.zeros((height, width), dtype=np.uint8, order="F")
            mask[top : top + side, left : left + side] = 1
            code = coco.encode(mask)
            annotation[str(number)] = {
                "segmentation": {"size": [height, width], "counts": code["counts"].decode("ascii")}
            }
    write_video(path, frames, ClipOptions(fps=24, keyframe_interval=48))
    return annotation
