"""State that the formats of one import share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from swim_fast.data.source.errors import DataError
from swim_fast.importing.clips import Clip, Clips, Mention, Objects, candidates, is_clip, make_records
from swim_fast.importing.sources import Names, exists, find_folder
from swim_fast.jobs import Import

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """State shared by formats: options, clips, names, and the list of what is left out."""

    options: Import
    clips: Clips
    names: Names
    note: Callable[[DataError], None]

    @contextmanager
    def noting(self, **where: str | int | None) -> Iterator[None]:
        """Take the DataErrors of the block; `where` is added to them."""
        try:
            yield
        except DataError as error:
            self.note(error.within(**where))

    def open(self, name: str, *folders: Path) -> Clip:
        """Return the clip of a name: `--media`, or in that folder, or else in the first of `folders` that exists.

        Raises:
            DataError: it is missing, or cannot be read.
        """
        media = self.options.media and Path(self.options.media)
        if media and is_clip(media) and not candidates(media, name):
            if name not in (media.stem, media.name):
                raise DataError(f"--media is the clip {media}; name the folder in which all clips are", name=name)
            return self.clips.open(media, name)
        return self.clips.find(media or find_folder(*folders), name)

    def open_image(self, name: str, *folders: Path) -> Clip:
        """Return the image of a path in `--media`, or else in the first of `folders` that has it.

        Raises:
            DataError: it is missing, or cannot be read.
        """
        paths = [folder / name for folder in ([Path(self.options.media)] if self.options.media else folders)]
        found = next((path for path in paths if exists(path)), paths[0])
        return self.clips.open(found, Path(name).stem, "image")

    def frame(self, number: int, every: int = 1) -> int:
        """Return the index of the frame that a mask of this number belongs to, by `--first` and `--every`."""
        return (number - self.options.first) * (self.options.every or every)

    def warn_of_rate(self, clip: Clip, frames: Collection[int]) -> None:
        """Warn if the masks of a video file look like those of a copy with fewer frames a second."""
        count = len(frames)
        contiguous = count > 1 and {*frames} == {*range(count)}
        if contiguous and clip.num_frames >= 2 * count and not clip.frames and not self.options.every:
            one_in = round(clip.num_frames / count)
            logger.warning(
                f"{clip.path}: there are masks of its first {count} frames alone, and it has {clip.num_frames}; if "
                f"they were made of one frame in {one_in}, they are on the wrong ones: see --every"
            )

    def records(self, objects: Objects) -> Iterator[dict]:
        """Yield the records about a clip's objects."""
        return self.records_about(objects.clip, objects.mentions(self.noting))

    def records_about(self, clip: Clip, mentions: Iterator[Mention]) -> Iterator[dict]:
        """Yield the records about what is mentioned of a clip."""
        return make_records(clip, mentions, self.options, self.noting)
