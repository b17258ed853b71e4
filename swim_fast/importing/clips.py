"""Clips, folders of frames and images of a data set: their frames' indices and size, and records about them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import check_mask_size
from swim_fast.data.video.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, natural_order
from swim_fast.data.video.reader import FrameReader
from swim_fast.importing.masks import Masks
from swim_fast.importing.naming import Name, ask, is_category, name_category, name_expression
from swim_fast.importing.sources import exists
from swim_fast.jobs import Import
from swim_fast.options import Decoding

# Takes the DataErrors of its block, and adds to them where they happened.
Noting = Callable[..., AbstractContextManager]


@dataclass(frozen=True)
class Clip:
    """A video file, folder of frames or image.

    Attributes:
        name: what the data set calls it.
        path: where it is.
        kind: "video" or "image".
        num_frames: frames of it.
        height, width: size of the upright frames in pixels.
        frames: names of the files of a folder of frames, in the order in which they are numbered; else empty.
    """

    name: str
    path: Path
    kind: str
    num_frames: int
    height: int
    width: int
    frames: tuple[str, ...] = ()

    @cached_property
    def indices(self) -> dict[str, int]:
        """Frame index by the name of a frame's file without its suffix."""
        return {Path(name).stem: index for index, name in enumerate(self.frames)}

    def index(self, stem: str, first: int = 0, every: int = 1) -> int:
        """Return the index of the frame that a mask's file, called `stem`, belongs to.

        In a folder of frames it is the one of the same name; in a video file `stem` is a number, `first` for the first
        frame, and one more for each `every` frames.

        Raises:
            DataError: no such frame.
        """
        if self.frames:
            if stem not in self.indices:
                raise DataError(f"{self.path} has no frame {stem!r}; a mask is named as its frame is")
            return self.indices[stem]
        digits = stem[len(stem.rstrip("0123456789")) :]
        if not digits:
            raise DataError(f"{stem!r} ends in no number; a mask of a video file is named by the number of its frame")
        if (index := (int(digits) - first) * every) < 0:
            raise DataError(f"frame {stem!r} is before the first, {first}; see --first")
        return index

    def check(self, frame: int, size: Sequence[int]) -> None:
        """Check a frame's index and its mask's [height, width].

        Raises:
            DataError: a frame past the end, or a mask of another size.
        """
        if not 0 <= frame < self.num_frames:
            raise DataError(
                f"frame {frame} is not in the clip: {self.path} has {self.num_frames} frames; is it the right one?"
            )
        check_mask_size(*size, self.height, self.width)


class Clips:
    """Opens clips, with checks, through the same readers as training. To be closed."""

    def __init__(self, decoding: Decoding = Decoding()):
        self._reader = FrameReader(decoding)

    def close(self) -> None:
        """End the decoder."""
        self._reader.close()

    def open(self, path: Path, name: str, kind: str = "video") -> Clip:
        """Return the clip at a path.

        Raises:
            DataError: it is missing or cannot be read.
        """
        if not exists(path):
            raise DataError(f"{path} does not exist; name the folder that it is in with --media", name=name)
        if kind == "image":
            return Clip(name, path, kind, 1, *_image_size(path))
        if path.is_dir():
            frames = frame_files(path)
            if not frames:
                raise DataError(f"{path} holds no frames ({' '.join(IMAGE_SUFFIXES)})", name=name)
            clip = Clip(name, path, kind, len(frames), *_image_size(path / frames[0]), tuple(frames))
            if len(clip.indices) < len(frames):
                raise DataError(f"{path} has two images of one name; are masks among the frames?", name=name)
            return clip
        info = self._reader.info(path)
        return Clip(name, path, kind, info.num_frames, info.height, info.width)

    def find(self, folder: Path, name: str) -> Clip:
        """Return the clip of a name in a folder: a folder of frames, or a video file of any usual suffix.

        Raises:
            DataError: it is missing, several have the name, or it cannot be read.
        """
        found = candidates(folder, name)
        if len(found) > 1:
            raise DataError(f"both {found[0]} and {found[1]} exist; leave the one that the masks belong to", name=name)
        return self.open(found[0] if found else folder / name, name)


def candidates(folder: Path, name: str) -> list[Path]:
    """Return what a folder has under the name of a clip: folders of frames and video files."""
    paths = (folder / (name + suffix) for suffix in ("", *VIDEO_SUFFIXES))
    return [path for path in paths if exists(path)]


def is_clip(path: Path) -> bool:
    """Tell if a path is a video file or folder of frames, rather than a folder of those."""
    return path.is_file() or (path.is_dir() and bool(frame_files(path)))


def frame_files(folder: Path) -> list[str]:
    """Return the names of the frames of a folder, in the order in which readers number them."""
    names = (name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")
    return sorted(names, key=natural_order)


def _image_size(path: Path) -> tuple[int, int]:
    """Return the height and width of an image as it is shown, of its header alone."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations of a quarter turn
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); restore the file") from None
    return (width, height) if turned else (height, width)


@dataclass
class Mention:
    """A name and the masks of what it names; `key` tells it from the others of its clip.

    `answer` is the source's own to a name that is a question.
    """

    key: str
    name: Name
    masks: Masks
    answer: str | None = None


@dataclass
class Objects:
    """Objects of one clip under their names; those of one name become one noun, with the union of their masks.

    Two dogs in a frame are "the dogs": a noun that could mean either is bound to both.
    """

    clip: Clip
    found: dict[str, list[Masks]] = field(default_factory=dict)
    crowds: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)  # a name in lower case -> as it is written

    def add(self, text: str, masks: Masks, crowd: bool = False) -> None:
        """Add an object; a `crowd` is several already."""
        text = " ".join(text.replace("_", " ").split())
        text = self.texts.setdefault(text.casefold(), text)
        if len(masks):
            self.found.setdefault(text, []).append(masks)
            if crowd:
                self.crowds.add(text)

    def mentions(self, noting: Noting) -> Iterator[Mention]:
        """Yield one mention per name; what is wrong with a name goes to `noting`."""
        for text, objects in self.found.items():
            with noting(name=self.clip.name, key=text):
                category = is_category(text)
                together = sum(len(masks) for masks in objects) > len(set().union(*(masks.frames for masks in objects)))
                several = together or text in self.crowds
                name = name_category(text, several) if category else name_expression(text)
                union = Masks()
                for masks in objects:
                    union.update(masks)
                yield Mention(text.replace(" ", "_"), name, union)


def make_records(clip: Clip, mentions: Iterable[Mention], options: Import, noting: Noting) -> Iterator[dict]:
    """Yield the records about a clip: `options.turns` questions with their answers in each.

    What is wrong with a mention (a mask on a frame that the clip does not have, or of another size than its frames; no
    mask at all; a question without answer) goes to `noting` and leaves that mention out.
    """
    turns, annotation, index = [], [], ""
    for mention in mentions:
        with noting(name=clip.name, key=mention.key):
            found = mention.masks.annotation()
            if not found:
                raise DataError("has no mask with a pixel in it")
            for frame, mask in found.items():
                clip.check(int(frame), mask["segmentation"]["size"])
            key = f"{clip.name}_{mention.key}"
            answers = [mention.answer] if mention.answer and mention.name.form == "question" else options.answer
            question, answer = ask(mention.name, clip.kind, key, options.question, answers)
            index = index or key
            shown = "" if turns else f"<{clip.kind}>\n"
            turns += [{"from": "human", "value": shown + question}, {"from": "gpt", "value": answer}]
            annotation.append(found)
        if len(annotation) == options.turns:
            yield _record(clip, options, index, turns, annotation)
            turns, annotation, index = [], [], ""
    if annotation:
        yield _record(clip, options, index, turns, annotation)


def _record(clip: Clip, options: Import, index: str, turns: list[dict], annotation: list[dict]) -> dict:
    media = media_path(clip.path, options.out)
    return {"index": index, clip.kind: media, "conversations": turns, "annotation": annotation}


def media_path(path: Path, out: str) -> str:
    """Spell the path of a medium in the records of `out`: relative below the folder of that file, else absolute."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(out)).parent
    return str(path.relative_to(folder) if folder in path.parents else path)
