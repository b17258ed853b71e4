"""CVAT's XML 1.1 (docs.cvat.ai, "XML annotation format"), of videos and of images, as a file or in the export's zip.

Of videos: `track`s with a `label`, of shapes with a `frame` of the video, `outside="1"` where the object is not seen.
Of images: `image`s with `name`, `width`, `height`, and shapes with a `label`. A `polygon` has `points="x,y;x,y;…"`; a
`mask` has runs along the rows of a box, `rle="3, 5, …"` with `left`, `top`, `width`, `height`, the first run outside.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import numpy as np

from swim_fast.data.source.errors import DataError
from swim_fast.importing.clips import Objects
from swim_fast.importing.job import Job
from swim_fast.importing.masks import Masks, decode, place

SHAPES = ("polygon", "mask", "box", "polyline", "points", "ellipse", "cuboid", "skeleton")


@dataclass(frozen=True)
class _Shape:
    """A shape as the file has it."""

    tag: str
    label: str
    values: dict[str, str]


@dataclass
class _Content:
    """Tracks of a video, or images with their attributes and shapes."""

    meta: dict[str, str] = field(default_factory=dict)
    tracks: list[list[_Shape]] = field(default_factory=list)
    images: dict[str, tuple[dict[str, str], list[_Shape]]] = field(default_factory=dict)


class CvatFile:
    """An XML file or its zip; the clip is `--media`, or the `source` that it names, in that folder or beside it."""

    def __init__(self, job: Job):
        self.job, self.path = job, Path(job.options.source)
        self.content = _read(self.path)
        if self.content.tracks and self.content.images:
            raise DataError("has tracks and images; export one task at a time", source=str(self.path))
        self.units = list(self.content.images) or [self.content.meta.get("source") or self.path.name]

    def records(self, unit: str) -> Iterator[dict]:
        """Yield the records of the video, or of an image."""
        objects = self._of_image(unit) if self.content.images else self._of_video()
        yield from self.job.records(objects)

    def _of_video(self) -> Objects:
        media, source = self.job.options.media, self.content.meta.get("source", "")
        path = Path(media) if media else self.path.parent / source
        if not media and not source:
            raise DataError("does not name its video; name it with --media", source=str(self.path))
        if media and source and (path / source).is_file():
            path /= source
        clip = self.job.clips.open(path, path.stem)
        size = {"height": clip.height, "width": clip.width} | self.content.meta  # polygons are in pixels of this size
        height, width = _number(size, "height"), _number(size, "width")
        objects = Objects(clip)
        for i, track in enumerate(self.content.tracks):
            with self.job.noting(name=clip.name, key=f"track {i} ({track[0].label})"):
                masks = Masks()
                for shape in track:
                    if shape.values.get("outside") != "1":
                        frame = self.job.frame(_number(shape.values, "frame"))
                        masks.add(frame, _mask(shape, height, width))
                if not len(masks):
                    raise DataError("is outside in every frame")
                objects.add(track[0].label, masks)
        return objects

    def _of_image(self, name: str) -> Objects:
        values, shapes = self.content.images[name]
        clip = self.job.open_image(name, self.path.parent, self.path.parent / "images")
        height, width = _number(values, "height"), _number(values, "width")
        objects = Objects(clip)
        for i, shape in enumerate(shapes):
            with self.job.noting(name=name, key=f"{shape.tag} {i} ({shape.label})"):
                masks = Masks()
                masks.add(0, _mask(shape, height, width))
                if not len(masks):
                    raise DataError("marks no pixel")
                objects.add(shape.label, masks)
        return objects


def _read(path: Path) -> _Content:
    """Read a file as a stream; expat refuses entities that would grow without bounds.

    Raises:
        DataError: it cannot be read, or is not CVAT's.
    """
    try:
        with _open(path) as file:
            content = _parse(file, path)
    except (OSError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        text = f"cannot be read as XML: {error}; give the annotations.xml of CVAT's export, or its zip"
        raise DataError(text, source=str(path)) from None
    if not content.tracks and not content.images:
        text = 'has no track with shapes and no image; export it as "CVAT for video 1.1" or "CVAT for images 1.1"'
        raise DataError(text, source=str(path))
    content.images = {name: item for name, item in content.images.items() if item[1]}
    return content


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        if "annotations.xml" not in archive.namelist():
            text = 'has no annotations.xml; export it as "CVAT for video 1.1" or "CVAT for images 1.1"'
            raise DataError(text, source=str(path))
        with archive.open("annotations.xml") as file:
            yield file


def _parse(file: IO[bytes], path: Path) -> _Content:
    content, parents = _Content(), []
    for event, element in ElementTree.iterparse(file, ("start", "end")):
        if event == "start":
            parents.append(element)
            continue
        parents.pop()
        inside = [parent.tag for parent in parents]
        if element.tag == "track":
            label = element.get("label", "")
            shapes = [_Shape(part.tag, label, dict(part.attrib)) for part in element if part.tag in SHAPES]
            content.tracks += [shapes] if shapes else []
        elif element.tag == "image":
            shapes = [_Shape(e.tag, e.get("label", ""), dict(e.attrib)) for e in element if e.tag in SHAPES]
            content.images[element.get("name", "")] = dict(element.attrib), shapes
        elif element.tag == "source" and "meta" in inside:
            content.meta["source"] = (element.text or "").strip()
        elif element.tag in ("width", "height") and "original_size" in inside:
            content.meta[element.tag] = (element.text or "").strip()
        elif element.tag == "tasks":
            raise DataError("is the export of a project; export it task by task", source=str(path))
        if element.tag in ("track", "image"):
            element.clear()
    return content


def _number(values: dict[str, Any], key: str) -> int:
    try:
        return round(float(values[key]))
    except (KeyError, ValueError, OverflowError):
        raise DataError(f"its {key} is {values.get(key)!r}, not a number") from None


def _mask(shape: _Shape, height: int, width: int) -> np.ndarray | None:
    if shape.tag == "polygon":
        try:
            points = [float(x) for point in shape.values.get("points", "").split(";") for x in point.split(",")]
        except ValueError:
            raise DataError("its points are not x,y;x,y;…") from None
        return decode([points], height, width)
    if shape.tag != "mask":
        raise DataError(f"is a {shape.tag}, which is no mask; draw polygons or masks")
    size = _number(shape.values, "height"), _number(shape.values, "width")
    try:
        runs = [int(run) for run in shape.values.get("rle", "").split(",")]
    except ValueError:
        raise DataError("its rle is not a list of numbers") from None
    if min(runs) < 0 or min(size) < 1 or size[0] > height or size[1] > width or sum(runs) != size[0] * size[1]:
        raise DataError(
            f"its rle covers {sum(runs)} pixels, its box of {size[0]} x {size[1]} (height x width) has others"
        )
    part = np.repeat(np.arange(len(runs)) % 2, runs).reshape(size)
    return place(part, _number(shape.values, "left"), _number(shape.values, "top"), height, width)
