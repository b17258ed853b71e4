"""Renders the demo's clips and writes what is said about them: H.264 files, exact masks, VideoRefer-style JSONL."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swim_fast.demo import texts
from swim_fast.demo.drawing import SUPERSAMPLING, background, sprite
from swim_fast.demo.scenes import SPLITS, ClipOptions, Scene, random_scene


def render(scene: Scene, options: ClipOptions | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw every frame of a scene.

    Returns:
        Frames, uint8 [T, H, W, 3], and visible masks, bool [T, items, H, W]: a pixel belongs to the object that shows
        on at least half of its area.
    """
    options = options or ClipOptions()
    size = (options.width, options.height)
    enlarged = (options.width * SUPERSAMPLING, options.height * SUPERSAMPLING)
    backdrop = background(*size, np.random.default_rng(scene.texture_seed)).resize(enlarged, Image.Resampling.BILINEAR)
    sprites = [sprite(item.noun, item.shade, item.radius, item.tilt) for item in scene.items]
    frames = np.empty((options.num_frames, options.height, options.width, 3), dtype=np.uint8)
    masks = np.empty((options.num_frames, len(scene.items), options.height, options.width), dtype=bool)
    for t in range(options.num_frames):
        picture, owner = backdrop.copy(), Image.new("L", enlarged)
        for i, (item, (colours, silhouette)) in enumerate(zip(scene.items, sprites, strict=True)):
            centre = item.centre(t / max(options.num_frames - 1, 1))
            corner = tuple(round(c * SUPERSAMPLING - colours.width / 2) for c in centre)
            picture.paste(colours, corner, silhouette)
            owner.paste(i + 1, (*corner, corner[0] + colours.width, corner[1] + colours.height), silhouette)
        frames[t] = picture.reduce(SUPERSAMPLING)
        for i in range(len(scene.items)):
            shown = owner.point([255 if value == i + 1 else 0 for value in range(256)])
            masks[t, i] = np.asarray(shown.reduce(SUPERSAMPLING)) >= 128
    return frames, masks


def write_video(path: str | PathLike[str], frames: np.ndarray, options: ClipOptions | None = None) -> None:
    """Encode uint8 [T, H, W, 3] frames as an H.264 mp4; the same frames give the same file."""
    import av

    options = options or ClipOptions()
    settings = {
        "crf": str(options.crf),
        "preset": "veryfast",
        "threads": "1",
        "g": str(options.keyframe_interval),
        # mbtree reads behind the last column of widths that are no multiple of 16, and its bytes vary from run to run.
        "x264-params": "scenecut=0:mbtree=0",
    }
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=options.fps, options=settings)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def annotations(scene: Scene, masks: np.ndarray, options: ClipOptions | None = None) -> list[dict[str, Any]]:
    """COCO RLE of every item in the annotated frames where a visual token can point at it; empty for one that hides.

    Args:
        masks: bool [T, items, H, W], see :func:`render`.

    Returns:
        Per item ``{"frame number": {"segmentation": {"size": [H, W], "counts": …}}}``.
    """
    from pycocotools import mask as coco

    options = options or ClipOptions()
    centres = slice(options.cell // 2, None, options.cell)
    found: list[dict[str, Any]] = [{} for _ in scene.items]
    for frame in scene.annotated:
        for item, mask in zip(found, masks[frame], strict=True):
            if mask[centres, centres].any():
                rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
                counts = rle["counts"].decode("ascii")
                item[str(frame)] = {"segmentation": {"size": [int(n) for n in rle["size"]], "counts": counts}}
    return found


def _record(
    index: str, video: str, turns: Sequence[tuple[str, str]], annotation: list[dict[str, Any]]
) -> dict[str, Any]:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": question if number else f"<video>\n{question}"})
        conversation.append({"from": "gpt", "value": answer})
    return {"index": index, "video": video, "conversations": conversation, "annotation": annotation}


def training_records(
    name: str, video: str, scene: Scene, found: list[dict], rng: np.random.Generator
) -> Iterator[dict]:
    """Conversations about one clip: a turn about each object in sight."""
    seen = [(item, where) for item, where in zip(scene.items, found, strict=True) if where]
    turns, annotation = [], []
    for i in rng.permutation(len(seen)):
        item, where = seen[i]
        template = texts.pick(rng, *texts.QUESTIONS, texts.DESCRIPTIONS)
        again = "{again}" in template[1] and bool(rng.integers(2))
        turns.append(texts.fill(template, item, tag_answer=again))
        annotation += [where] * (2 if again else 1)
    if turns:
        yield _record(f"{name}_turns", video, turns, annotation)


def held_out_records(
    name: str, video: str, scene: Scene, found: list[dict], rng: np.random.Generator
) -> Iterator[dict]:
    """One question with a certain answer about each object in sight of one clip."""
    for item, where in zip(scene.items, found, strict=True):
        if where:
            template = texts.pick(rng, *texts.QUESTIONS)
            turn = texts.fill(template, item, tag_answer=False)
            yield _record(f"{name}_{item.noun}", video, [turn], [where])


def write_clip(number: int, *, folder: Path, seed: int, split: str, options: ClipOptions) -> list[dict[str, Any]]:
    """Render and encode one clip of a split; returns its records."""
    scene = random_scene(seed, split, number, options)
    frames, masks = render(scene, options)
    name = f"{split}_{number:05d}"
    video = f"clips/{name}.mp4"
    write_video(folder / video, frames, options)
    rng = np.random.default_rng([seed, SPLITS.index(split), number, 1])
    records = training_records if split == "train" else held_out_records
    return list(records(name, video, scene, annotations(scene, masks, options), rng))


@dataclass(frozen=True)
class DemoData:
    """Where :func:`write_demo_data` put things; videos are named relative to ``folder``."""

    folder: Path
    train: Path
    heldout: Path


def write_demo_data(
    folder: str | PathLike[str],
    *,
    seed: int,
    train_clips: int = 1000,
    heldout_clips: int = 60,
    options: ClipOptions | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> DemoData:
    """Write ``train.jsonl``, ``heldout.jsonl`` and their ``clips/*.mp4``; same seed, same bytes.

    Args:
        folder: made if absent; files of the same names are replaced.
        seed: of everything; clips of the two splits are drawn independently.
        train_clips, heldout_clips: how many of each.
        options: shape of the clips.
        workers: processes that render; by default one per core. None of them changes the result.
        progress: whether to show a progress bar.

    Returns:
        The paths of what was written.
    """
    from tqdm import tqdm

    folder, options = Path(folder), options or ClipOptions()
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")  # the caller may run threads, which do not survive a fork
    with (
        ProcessPoolExecutor(workers, mp_context=spawn) as pool,
        tqdm(desc="rendering", unit="clip", total=train_clips + heldout_clips, disable=not progress) as bar,
    ):
        for split, clips in zip(SPLITS, (train_clips, heldout_clips), strict=True):
            render_one = partial(write_clip, folder=folder, seed=seed, split=split, options=options)
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for records in pool.map(render_one, range(clips), chunksize=4):
                    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                    bar.update()
    return DemoData(folder, folder / "train.jsonl", folder / "heldout.jsonl")
