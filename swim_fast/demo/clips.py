"""The demo's clips and what is said about them: H.264 files, exact masks, VideoRefer-style JSONL."""

from __future__ import annotations

import json
import multiprocessing
import os
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
from swim_fast.demo.scenes import DEFAULTS, SPLITS, STATES, ClipOptions, Scene, random_scene
from swim_fast.files import atomic_write
from swim_fast.viz.heatmap_video import write_h264


def render(scene: Scene, options: ClipOptions = DEFAULTS) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene: frames, uint8 [T, H, W, 3], and visible masks, bool [T, items, H, W].

    A pixel belongs to the object that shows on at least half of its area.
    """
    size = (options.width, options.height)
    enlarged = (options.width * SUPERSAMPLING, options.height * SUPERSAMPLING)
    backdrop = background(*size, np.random.default_rng(scene.texture_seed)).resize(enlarged, Image.Resampling.BILINEAR)
    sprites = [
        [sprite(item.noun, STATES[item.state][turn], item.radius, item.tilt) for item in scene.items]
        for turn in range(2)
    ]
    frames = np.empty((options.num_frames, options.height, options.width, 3), dtype=np.uint8)
    masks = np.empty((options.num_frames, len(scene.items), options.height, options.width), dtype=bool)
    for t in range(options.num_frames):
        picture, owner = backdrop.copy(), Image.new("L", enlarged)
        for i, (item, (colours, silhouette)) in enumerate(zip(scene.items, sprites[scene.turn(t)], strict=True)):
            centre = item.centre(t / max(options.num_frames - 1, 1))
            corner = tuple(round(c * SUPERSAMPLING - colours.width / 2) for c in centre)
            picture.paste(colours, corner, silhouette)
            owner.paste(i + 1, (*corner, corner[0] + colours.width, corner[1] + colours.height), silhouette)
        frames[t] = picture.reduce(SUPERSAMPLING)
        for i in range(len(scene.items)):
            shown = owner.point([255 if value == i + 1 else 0 for value in range(256)])
            masks[t, i] = np.asarray(shown.reduce(SUPERSAMPLING)) >= 128
    return frames, masks


def write_video(path: str | PathLike[str], frames: np.ndarray, options: ClipOptions = DEFAULTS) -> None:
    """Encode uint8 [T, H, W, 3] frames as an H.264 mp4; the same frames give the same file."""
    settings = {
        "crf": str(options.crf),
        "preset": "veryfast",
        "threads": "1",
        "g": str(options.keyframe_interval),
        # mbtree reads behind the last column of widths that are no multiple of 16, and its bytes vary from run to run.
        "x264-params": "scenecut=0:mbtree=0",
    }
    write_h264(path, frames, options.fps, settings)


def encode_annotations(scene: Scene, masks: np.ndarray, options: ClipOptions = DEFAULTS) -> list[dict[str, Any]]:
    """Encode each item in the annotated frames in which a visual token can point at it.

    Args:
        masks: bool [T, items, H, W], see `render`.

    Returns:
        Per item `{"frame index": {"segmentation": {"size": [H, W], "counts": …}}}`, COCO RLE; empty for one that hides.
    """
    from pycocotools import mask as coco

    centres = slice(options.cell // 2, None, options.cell)
    found: list[dict[str, Any]] = [{} for _ in scene.items]
    for frame in scene.annotated:
        for item, mask in zip(found, masks[frame], strict=True):
            if mask[centres, centres].any():
                rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
                counts = rle["counts"].decode("ascii")
                item[str(frame)] = {"segmentation": {"size": [int(n) for n in rle["size"]], "counts": counts}}
    return found


def write_clip(index: int, *, folder: Path, seed: int, split: str, options: ClipOptions) -> list[dict[str, Any]]:
    """Render and encode one clip of a split; return its records."""
    scene = random_scene(seed, split, index, options)
    frames, masks = render(scene, options)
    clip = f"{split}_{index:05d}"
    video = f"clips/{clip}.mp4"
    write_video(folder / video, frames, options)
    records, train = [], split == "train"
    for item, where in zip(scene.items, encode_annotations(scene, masks, options), strict=True):
        if where:
            question, answer = texts.ask(item.noun, item.state, tag_answer=train)
            said = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}]
            annotation = [where] * (2 if train else 1)
            records.append(
                {"index": f"{clip}_{item.noun}", "video": video, "conversations": said, "annotation": annotation}
            )
    return records


def mix_up_masks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each record of a clip the masks of the next one, which asks about another object; one alone is left out."""
    masks = [record["annotation"] for record in records]
    mixed = zip(records, masks[1:] + masks[:1], strict=True)
    return [{**record, "annotation": other} for record, other in mixed] if len(records) > 1 else []


@dataclass(frozen=True)
class DemoData:
    """Files of `write_demo_data`; videos are named relative to `folder`."""

    folder: Path
    train: Path
    heldout: Path
    wrong_masks: Path

    @classmethod
    def of(cls, folder: Path) -> DemoData:
        """Name the files of a folder, which need not be there yet."""
        return cls(folder, *(folder / f"{name}.jsonl" for name in ("train", "heldout", "wrong_masks")))


def write_demo_data(
    folder: str | PathLike[str],
    *,
    seed: int,
    train_clips: int = 1000,
    heldout_clips: int = 60,
    options: ClipOptions = DEFAULTS,
    workers: int | None = None,
    progress: bool = True,
) -> DemoData:
    """Write `train.jsonl`, `heldout.jsonl` and their `clips/*.mp4`; same seed, same bytes.

    `wrong_masks.jsonl` is `train.jsonl` with the masks of another object of the clip, see `mix_up_masks`.

    Args:
        folder: made if absent; files of the same names are replaced.
        seed: of everything; clips of the two splits are drawn independently.
        train_clips, heldout_clips: number of each.
        options: shape of the clips.
        workers: processes that render, one per core by default; their number does not change the result.
        progress: show a progress bar.
    """
    from swim_fast.progress_bar import ProgressBar

    folder = Path(folder)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")  # the caller may run threads, which do not survive a fork
    with (
        ProcessPoolExecutor(workers, mp_context=spawn) as pool,
        ProgressBar(desc="rendering", unit="clip", total=train_clips + heldout_clips, disable=not progress) as bar,
    ):
        train, heldout = [], []
        for split, clips, records in zip(SPLITS, (train_clips, heldout_clips), (train, heldout), strict=True):
            render_one = partial(write_clip, folder=folder, seed=seed, split=split, options=options)
            for of_clip in pool.map(render_one, range(clips), chunksize=4):
                records.append(of_clip)
                bar.update()
    data = DemoData.of(folder)
    for path, records in ((data.train, train), (data.heldout, heldout), (data.wrong_masks, map(mix_up_masks, train))):
        with atomic_write(path) as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for of_clip in records for record in of_clip)
    return data
