"""LabelMe: a JSON file per image, with `imagePath`, `imageHeight`, `imageWidth` and `shapes`.

A shape has a `label`, `points` [[x, y], …], a `shape_type` and perhaps a `group_id` that it shares with the other parts
of its object. A polygon is its points; a mask has a PNG in base64 under `mask`, whose corner is the first point.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from swim_fast.data.source.errors import DataError
from swim_fast.importing.clips import Clip, Objects
from swim_fast.importing.job import Job
from swim_fast.importing.masks import Masks, decode, place
from swim_fast.importing.sources import entry, read_json


class LabelmeFiles:
    """A file or a folder of them; each is an image of its own."""

    def __init__(self, job: Job):
        self.job, source = job, Path(job.options.source)
        own = {Path(path).resolve() for path in (job.options.names, job.options.out) if path}
        paths = sorted(source.rglob("*.json")) if source.is_dir() else [source]
        root = source if source.is_dir() else source.parent
        self.files = {str(path.relative_to(root)): path for path in paths if path.resolve() not in own}
        if not self.files:
            raise DataError("holds no .json files", source=job.options.source)
        self.units = list(self.files)

    def records(self, unit: str) -> Iterator[dict]:
        """Yield the records of an image."""
        path = self.files[unit]
        value = read_json(path)
        image = PurePosixPath(entry(value, "imagePath", str).replace("\\", "/"))
        folders = (path.parent, path.parent / image.parent)
        clip = self.job.open_image(image.name, *folders)
        objects = Objects(clip)
        for (label, _), masks in self.read(unit, value, clip, 0).items():
            objects.add(label, masks)
        yield from self.job.records(objects)

    def read(self, unit: str, value: dict, clip: Clip, frame: int) -> dict[tuple[str, str], Masks]:
        """Return the masks of one image's objects, by label and group."""
        height, width = entry(value, "imageHeight", int), entry(value, "imageWidth", int)
        clip.check(frame, (height, width))
        found: dict[tuple[str, str], Masks] = {}
        for i, shape in enumerate(entry(value, "shapes", list)):
            with self.job.noting(name=unit, key=f"shapes[{i}]"):
                label = re.sub(r"[-_ ]\d+$", "", entry(shape, "label", str))  # dog-1: the first of the dogs
                group = shape.get("group_id")
                mask = _mask(shape, height, width)
                if mask is None:
                    raise DataError("marks no pixel")
                key = label, f"shape {i}" if group is None else f"group {group}"
                found.setdefault(key, Masks()).add(frame, mask)
        return found


class LabelmeVideo(LabelmeFiles):
    """Files that are about the frames of one clip: the folder of the files itself, or `--media`."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.name = Path(job.options.media or job.options.source).stem
        self.units = [self.name]

    def records(self, unit: str) -> Iterator[dict]:
        """Yield the records of the clip."""
        clip = self.job.clips.open(Path(self.job.options.media or self.job.options.source), unit)
        found: dict[tuple[str, str], Masks] = {}
        for name, path in self.files.items():
            with self.job.noting(name=name):
                frame = clip.index(path.stem, self.job.options.first, self.job.options.every or 1)
                for (label, group), masks in self.read(name, read_json(path), clip, frame).items():
                    key = label, group if group.startswith("group") else f"{name}, {group}"
                    found.setdefault(key, Masks()).update(masks)
        objects = Objects(clip)
        for (label, _), masks in found.items():
            objects.add(label, masks)
        yield from self.job.records(objects)


def _mask(shape: dict, height: int, width: int) -> np.ndarray | None:
    kind = shape.get("shape_type", "polygon")
    points = entry(shape, "points", list)
    if kind == "polygon":
        return decode([[float(x) for point in points for x in _pair(point)]], height, width)
    if kind != "mask":
        raise DataError(f"is a {kind}, which is no mask; draw polygons, or make masks of it with SAM 2")
    left, top = (round(x) for x in _pair(points[0] if points else None))
    return place(_picture(entry(shape, "mask", str)), left, top, height, width)


def _pair(point: object) -> list:
    if not (
        isinstance(point, list) and len(point) == 2 and all(type(x) in (int, float) and abs(x) < 1e6 for x in point)
    ):
        raise DataError(f"the point {point!r} is no [x, y]")
    return point


def _picture(text: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            return np.array(image.convert("L")) > 0
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"its mask does not decode: {error}") from None
