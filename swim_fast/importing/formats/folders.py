"""Folders of mask images: DAVIS and YouTube-VOS (a PNG per frame), SA-V, SAM 2 and plain ones (per object and frame).

DAVIS: `JPEGImages/480p/bear/00000.jpg`, `Annotations/480p/bear/00000.png`. YouTube-VOS: `JPEGImages/ID/00000.jpg`,
`Annotations/ID/00000.png`, `meta.json` with `videos.ID.objects.1.category`. A pixel of a mask holds the number of its
object. SA-V's val and test sets and SAM 2's `vos_inference.py --per_obj_png_file` have `ID/001/00004.png` instead, one
folder per object, of masks that may overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from swim_fast.data.source.errors import DataError
from swim_fast.importing.clips import Clip, Objects, frame_files, is_clip
from swim_fast.importing.job import Job
from swim_fast.importing.masks import Masks, read_labels, read_mask
from swim_fast.importing.sources import dig, entry, read_json, subfolders


class _Folders:
    """Clips whose masks are in folders of their names."""

    annotation_folders: tuple[str, ...]
    media_folders: tuple[str, ...]

    def __init__(self, job: Job):
        self.job = job
        self.root = Path(job.options.source)
        if not self.root.is_dir():
            raise DataError("is no folder; name the one with the masks' folders in it", source=job.options.source)
        found = [self.root / name for name in self.annotation_folders if (self.root / name).is_dir()]
        self.annotations = found[0] if found else self.root
        self.units = self._units()

    def _units(self) -> list[str]:
        return subfolders(self.annotations)

    def _open(self, name: str) -> Clip:
        folders = [self.root / folder for folder in self.media_folders]
        folders += [self.annotations.parents[up] / folder for up in (0, 1) for folder in self.media_folders]
        inner = [folder / self.annotations.name for folder in folders]  # JPEGImages/480p beside Annotations/480p
        return self.job.open(name, *inner, *dict.fromkeys(folders))


class PaletteFolders(_Folders):
    """One image of object numbers per frame; names from meta.json (YouTube-VOS) or `--names`."""

    annotation_folders = ("Annotations",)
    media_folders = ("JPEGImages",)

    def __init__(self, job: Job):
        super().__init__(job)
        metas = [folder / "meta.json" for folder in (self.root, self.annotations.parent)]
        meta = next((path for path in metas if path.is_file()), None)
        self.videos = {} if meta is None else entry(read_json(meta), "videos", dict)

    def _units(self) -> list[str]:
        inner = subfolders(self.annotations)
        if inner and not any(frame_files(self.annotations / name) for name in inner):  # DAVIS: a folder per resolution
            if len(inner) > 1:
                text = f"{self.annotations} has {', '.join(inner)}; name one of these folders as the source"
                raise DataError(text, source=self.job.options.source)
            self.annotations /= inner[0]
        return subfolders(self.annotations)

    def records(self, video: str) -> Iterator[dict]:
        """Yield the records of a clip."""
        clip = self._open(video)
        objects = Objects(clip)
        for number, found in sorted(read_palette(self.job, self.annotations / video, clip).items()):
            with self.job.noting(name=video):
                objects.add(self.job.names.find(video, str(number), self._category(video, str(number))), found)
        yield from self.job.records(objects)

    def _category(self, video: str, number: str) -> str | None:
        found = dig(self.videos, video, "objects", number, "category")
        return found if isinstance(found, str) else None


def read_palette(job: Job, folder: Path, clip: Clip) -> dict[int, Masks]:
    """Return the masks of a clip by object number, from a folder with an image of object numbers per frame.

    Raises:
        DataError: no such folder, or one that marks no object; what is wrong with one image goes to the job.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; restore the masks of this clip")
    masks: dict[int, Masks] = {}
    for file, frame in _frames(job, folder, clip):
        with job.noting(name=clip.name, key=str(file)):
            labels = read_labels(file)
            clip.check(frame, labels.shape)
            for number in np.unique(labels[labels > 0]).tolist():
                masks.setdefault(number, Masks()).add(frame, labels == number)
    if not masks:
        raise DataError(f"{folder} marks no object in any frame", name=clip.name)
    return masks


def _frames(job: Job, folder: Path, clip: Clip) -> Iterator[tuple[Path, int]]:
    """Yield each mask's file and the index of its frame."""
    for name in frame_files(folder):
        with job.noting(name=clip.name, key=str(folder / name)):
            yield folder / name, clip.index(Path(name).stem, job.options.first, job.options.every or 1)


class ObjectFolders(_Folders):
    """One image per object and frame, `CLIP/OBJECT/FRAME.png`, or `OBJECT/FRAME.png` of the one clip `--media`.

    A folder's name that is no number names its object.
    """

    annotation_folders = ("Annotations", "Annotations_6fps", "masks")
    media_folders = ("JPEGImages", "JPEGImages_24fps", "videos", "frames")

    def _units(self) -> list[str]:
        inner = subfolders(self.annotations)
        self.single = any(frame_files(self.annotations / name) for name in inner)
        if not self.single:
            return inner
        media = self.job.options.media
        if media is None or not is_clip(Path(media)):
            text = f"{self.annotations} holds folders of one clip's objects; name that clip with --media"
            raise DataError(text, source=self.job.options.source)
        return [Path(media).stem]

    def records(self, video: str) -> Iterator[dict]:
        """Yield the records of a clip."""
        clip = self._open(video)
        folder = self.annotations if self.single else self.annotations / video
        objects = Objects(clip)
        for number in subfolders(folder):
            with self.job.noting(name=video):
                known = number.replace("_", " ") if not number.isdigit() else None
                objects.add(self.job.names.find(video, number, known), self._read(clip, folder / number))
        yield from self.job.records(objects)

    def _read(self, clip: Clip, folder: Path) -> Masks:
        masks, found = Masks(), list(_frames(self.job, folder, clip))
        self.job.warn_of_rate(clip, [frame for _, frame in found])
        for file, frame in found:
            with self.job.noting(name=clip.name, key=str(file)):
                mask = read_mask(file)
                clip.check(frame, mask.shape)
                masks.add(frame, mask)
        if not len(masks):
            raise DataError(f"{folder} marks no pixel in any frame", key=f"object {folder.name}")
        return masks
