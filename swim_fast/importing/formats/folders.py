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
from swim_fast.importing.clips import Clip, Objects, frame_files, make_records
from swim_fast.importing.job import Job
from swim_fast.importing.masks import Masks, read_labels, read_mask
from swim_fast.importing.sources import entry, find_folder, read_json, subfolders


class _Folders:
    """Clips whose masks are in folders of their names."""

    annotation_folders: tuple[str, ...]
    media_folders: tuple[str, ...]

    def __init__(self, job: Job):
        self.job, options = job, job.options
        self.root = Path(options.source)
        if not self.root.is_dir():
            raise DataError("is no folder; name the one with the masks' folders in it", source=options.source)
        found = [self.root / name for name in self.annotation_folders if (self.root / name).is_dir()]
        self.annotations = self._resolution(found[0] if found else self.root)
        self.every = options.every or 1
        self.units = self._units()

    def _units(self) -> list[str]:
        return subfolders(self.annotations)

    def _resolution(self, folder: Path) -> Path:
        """Return the folder of the clips: DAVIS has one of a resolution between."""
        return folder

    def _open(self, name: str) -> Clip:
        clips, media = self.job.clips, self.job.options.media
        if media is not None:
            return clips.open(Path(media), name) if self.is_clip(Path(media)) else clips.find(Path(media), name)
        candidates = [self.root / folder for folder in self.media_folders]
        candidates += [self.annotations.parents[up] / folder for up in (0, 1) for folder in self.media_folders]
        folder = find_folder(*dict.fromkeys(candidates))
        if not (folder / name).exists() and (folder / self.annotations.name).is_dir():
            folder /= self.annotations.name  # DAVIS: JPEGImages/480p beside Annotations/480p
        return clips.find(folder, name)

    @staticmethod
    def is_clip(path: Path) -> bool:
        """Tell if `--media` names a clip itself, rather than a folder of clips."""
        return path.is_file() or (path.is_dir() and bool(frame_files(path)))


class PaletteFolders(_Folders):
    """One image of object numbers per frame; names from meta.json (YouTube-VOS) or `--names`."""

    annotation_folders = ("Annotations",)
    media_folders = ("JPEGImages",)

    def __init__(self, job: Job):
        super().__init__(job)
        metas = [folder / "meta.json" for folder in (self.root, self.annotations.parent)]
        meta = next((path for path in metas if path.is_file()), None)
        self.videos = {} if meta is None else entry(read_json(meta), "videos", dict)

    def _resolution(self, folder: Path) -> Path:
        inner = subfolders(folder)
        if not inner or any(frame_files(folder / name) for name in inner):
            return folder
        if len(inner) > 1:
            raise DataError(
                f"{folder} has {', '.join(inner)}; name one of these folders as the source",
                source=self.job.options.source,
            )
        return folder / inner[0]

    def records(self, video: str) -> Iterator[dict]:
        """Yield the records of a clip."""
        clip = self._open(video)
        masks = self.read(video, clip)
        objects = Objects(clip)
        for number, found in sorted(masks.items()):
            with self.job.noting(name=video):
                objects.add(self.job.names.find(video, str(number), self._category(video, str(number))), found)
        yield from make_records(clip, objects.mentions(self.job.noting), self.job.options, self.job.noting)

    def read(self, video: str, clip: Clip) -> dict[int, Masks]:
        """Return the masks of a clip by object number."""
        folder = self.annotations / video
        masks: dict[int, Masks] = {}
        for file in frame_files(folder):
            with self.job.noting(name=video, key=str(folder / file)):
                frame = clip.index(Path(file).stem, self.job.options.first, self.every)
                labels = read_labels(folder / file)
                clip.check(frame, labels.shape)
                for number in np.unique(labels[labels > 0]).tolist():
                    masks.setdefault(number, Masks()).add(frame, labels == number)
        if not masks:
            raise DataError(f"{folder} marks no object in any frame", name=video)
        return masks

    def _category(self, video: str, number: str) -> str | None:
        found = self.videos.get(video, {}).get("objects", {}).get(number, {}).get("category")
        return found if isinstance(found, str) else None


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
        if media is None or not self.is_clip(Path(media)):
            raise DataError(
                f"{self.annotations} holds folders of one clip's objects; name that clip with --media",
                source=self.job.options.source,
            )
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
        yield from make_records(clip, objects.mentions(self.job.noting), self.job.options, self.job.noting)

    def _read(self, clip: Clip, folder: Path) -> Masks:
        masks = Masks()
        for file in frame_files(folder):
            with self.job.noting(name=clip.name, key=str(folder / file)):
                frame = clip.index(Path(file).stem, self.job.options.first, self.every)
                mask = read_mask(folder / file)
                clip.check(frame, mask.shape)
                masks.add(frame, mask)
        if not len(masks):
            raise DataError(f"{folder} marks no pixel in any frame", key=f"object {folder.name}")
        return masks
