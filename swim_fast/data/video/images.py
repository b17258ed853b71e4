"""Images and folders of frames as clips, and what the files of clips are called."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from swim_fast.data.video.containers import Broken

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")


class Images:
    """A folder of frames, in natural order (`9.jpg` before `10.jpg`), or a single image. Frame rate: 1."""

    fps = 1.0

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self.num_frames = len(paths)
        self.height, self.width = self._load(0).shape[:2]

    def _load(self, index: int) -> np.ndarray:
        from PIL import Image, ImageOps

        with Image.open(self._paths[index]) as image:
            if image.mode.startswith(("I", "F")):
                raise Broken(f"{self._paths[index].name} has more than 8 bits per channel; convert it to 8-bit RGB")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))

    def read(self, indices: list[int], out: np.ndarray) -> None:
        for slot, index in zip(out, indices, strict=True):
            image = self._load(index)
            if image.shape != slot.shape:
                raise Broken(
                    f"{self._paths[index].name} is {image.shape[:2]}, the first frame is {slot.shape[:2]} "
                    "(height, width); all frames of a folder must have one size"
                )
            slot[:] = image


def natural_order(name: str) -> list:
    """Return the sort key under which numbers inside names compare as numbers."""
    return [(1, int(part), part) if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name) if part]
