"""COCO's instances of images, and YouTube-VIS, which has the same of videos.

COCO: `images` (id, file_name, width, height), `annotations` (image_id, category_id, segmentation, iscrowd) and
`categories` (id, name). YouTube-VIS: `videos` (id, width, height, length, file_names) and in each annotation `video_id`
and `segmentations`, one code, list of polygons or null for each of the file_names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.importing.clips import Clip, Objects
from swim_fast.importing.job import Job
from swim_fast.importing.masks import Masks
from swim_fast.importing.sources import entry, read_json

ID = (int, str)


class CocoFile:
    """Instances of images; images are in `--media`, beside the file, or in `train2017/` for `…_train2017.json`."""

    media, owner = "images", "image_id"

    def __init__(self, job: Job):
        self.job, self.path = job, Path(job.options.source)
        data = read_json(self.path)
        try:
            categories = entry(data, "categories", list)
            self.categories = {entry(one, "id", ID): entry(one, "name", str) for one in categories}
            self.items: dict[str, dict] = {}
            for one in entry(data, self.media, list):
                if self.items.setdefault(name := self.name(one), one) is not one:
                    raise DataError(f"two {self.media} are called {name!r}", key=self.media)
            self.annotations: dict[Any, list[dict]] = defaultdict(list)
            for i, annotation in enumerate(entry(data, "annotations", list)):
                self.annotations[entry(annotation, self.owner, ID, f"annotations[{i}].")].append(annotation)
            self.units = [name for name, item in self.items.items() if entry(item, "id", ID) in self.annotations]
        except DataError as error:
            raise error.within(source=job.options.source) from None

    def name(self, item: dict) -> str:
        """Return the name of the unit that an image is."""
        return entry(item, "file_name", str, "images: ")

    def records(self, unit: str) -> Iterator[dict]:
        """Yield the records of an image or video."""
        item = self.items[unit]
        clip = self.open(unit, item)
        objects = Objects(clip)
        for annotation in self.annotations[item["id"]]:
            with self.job.noting(name=unit, key=f"annotation {annotation.get('id')}"):
                category = self.categories.get(number := entry(annotation, "category_id", ID))
                if category is None:
                    raise DataError(f"category_id {number!r} is not among the categories")
                masks = Masks()
                for frame, segmentation in self.segmentations(annotation, item, clip):
                    masks.add_code(frame, segmentation, entry(item, "height", int), entry(item, "width", int))
                if not len(masks):
                    raise DataError("has no segmentation with a pixel in it; a bbox alone is no mask")
                objects.add(category, masks, crowd=bool(annotation.get("iscrowd")))
        yield from self.job.records(objects)

    def open(self, unit: str, item: dict) -> Clip:
        """Return the image."""
        split = self.path.parent.parent / self.path.stem.rpartition("_")[2]
        return self.job.open_image(unit, self.path.parent, split, self.path.parent.parent / "images")

    def segmentations(self, annotation: dict, item: dict, clip: Clip) -> Iterator[tuple[int, Any]]:
        """Yield the frames of an annotation and its segmentation there."""
        yield 0, annotation.get("segmentation")


class YoutubeVisFile(CocoFile):
    """Instances of videos, which are folders of frames in `--media`, `JPEGImages/`, `train/JPEGImages/` or beside."""

    media, owner = "videos", "video_id"

    def name(self, item: dict) -> str:  # noqa: D102
        names = entry(item, "file_names", list, "videos: ")
        if not names or not all(isinstance(name, str) for name in names):
            raise DataError("is no list of the files of frames", key="videos: file_names")
        return str(PurePosixPath(names[0]).parent)

    def open(self, unit: str, item: dict) -> Clip:  # noqa: D102
        folder = self.path.parent
        return self.job.open(
            unit, folder / "JPEGImages", folder / self.path.stem / "JPEGImages", folder / "train/JPEGImages", folder
        )

    def segmentations(self, annotation: dict, item: dict, clip: Clip) -> Iterator[tuple[int, Any]]:  # noqa: D102
        found = entry(annotation, "segmentations", list)
        if len(found) != len(item["file_names"]):
            text = f"has {len(found)} segmentations for the {len(item['file_names'])} frames of the video"
            raise DataError(text)
        for name, segmentation in zip(item["file_names"], found, strict=True):
            if segmentation is not None:
                yield clip.index(PurePosixPath(name).stem), segmentation
