"""Referring expressions with masks: Ref-YouTube-VOS, Ref-DAVIS, MeViS, ReVOS and others of their form.

`meta_expressions.json`: `videos.ID.frames` (names of the frames without suffix) and `videos.ID.expressions.K`, each
with `exp`. Its object is `obj_id` in the PNGs of `Annotations/ID` (Ref-YouTube-VOS, Ref-DAVIS), or each of the list
`anno_id` in `mask_dict.json`, which has one run-length code or null for each of `frames` (MeViS, ReVOS). `ans` answers
an expression that is a question (FeVOS).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.importing.clips import Clip, Mention
from swim_fast.importing.formats.folders import read_palette
from swim_fast.importing.job import Job
from swim_fast.importing.masks import Masks
from swim_fast.importing.naming import name_expression
from swim_fast.importing.sources import entry, find_folder, read_json


class Expressions:
    """A file of expressions, or the folder that holds it."""

    def __init__(self, job: Job):
        self.job = job
        self.path = _find_file(Path(job.options.source))
        self.videos = entry(read_json(self.path), "videos", dict)
        self.units = list(self.videos)
        # meta_expressions/train/meta_expressions.json is about train/
        folder = self.path.resolve().parent
        self.folders = [folder, folder.parent.parent / folder.name]
        codes = self.path.parent / "mask_dict.json"
        self.codes = read_json(codes) if codes.is_file() else None

    def records(self, video: str) -> Iterator[dict]:
        """Yield the records of a clip."""
        info = self.videos[video]
        where = f"videos.{video}."
        expressions = entry(info, "expressions", dict, where)
        clip = self.job.open(video, *(folder / "JPEGImages" for folder in self.folders), *self.folders)
        if self.codes is not None:
            frames = sorted(map(str, entry(info, "frames", list, where)))  # as the published loaders do
            objects: Any = _Codes(self.codes, clip, [clip.index(frame) for frame in frames])
        else:
            annotations = find_folder(*(folder / "Annotations" for folder in self.folders))
            objects = _Palette(read_palette(self.job, annotations / video, clip))
        yield from self.job.records_about(clip, self._mentions(video, expressions, objects))

    def _mentions(self, video: str, expressions: dict, objects: Any) -> Iterator[Mention]:
        for key, expression in expressions.items():
            with self.job.noting(name=video, key=f"expression {key}"):
                text = entry(expression, "exp", str)
                masks = objects.masks(expression)
                answer = expression.get("ans")
                yield Mention(key, name_expression(text), masks, answer if isinstance(answer, str) else None)


class _Palette:
    """Objects of a clip in PNGs, by `obj_id`."""

    def __init__(self, found: dict[int, Masks]):
        self.found = found

    def masks(self, expression: dict) -> Masks:
        """Return the union of the masks of an expression's objects."""
        numbers = entry(expression, "obj_id", (str, int, list))
        union = Masks()
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if not str(number).isdecimal() or int(number) not in self.found:
                raise DataError(f"object {number!r} has no mask in any frame")
            union.update(self.found[int(number)])
        return union


class _Codes:
    """Objects of a clip in `mask_dict.json`, by `anno_id`; each is decoded once."""

    def __init__(self, codes: dict, clip: Clip, frames: list[int]):
        self.codes, self.clip, self.frames = codes, clip, frames
        self.found: dict[str, Masks] = {}

    def masks(self, expression: dict) -> Masks:
        """Return the union of the masks of an expression's objects."""
        union = Masks()
        for number in entry(expression, "anno_id", list):
            union.update(self._decoded(str(number)))
        if not len(union):
            raise DataError("has no object with a mask: the source says that nothing answers to it")
        return union

    def _decoded(self, number: str) -> Masks:
        if number not in self.found:
            codes = entry(self.codes, number, list, "mask_dict.json: ")
            if len(codes) != len(self.frames):
                text = f"has {len(codes)} codes for the {len(self.frames)} frames of the clip"
                raise DataError(text, key=f"mask_dict.json: {number}")
            masks = Masks()
            for frame, code in zip(self.frames, codes, strict=True):
                masks.add_code(frame, code, self.clip.height, self.clip.width)
            self.found[number] = masks
        return self.found[number]


def _find_file(source: Path) -> Path:
    """Return the file of expressions that a path means.

    Raises:
        DataError: there is none, or several.
    """
    if source.is_file():
        return source
    found = sorted({*source.glob("meta_expressions*.json"), *source.glob("meta_expressions/*/meta_expressions.json")})
    if len(found) == 1:
        return found[0]
    several = f"holds {', '.join(str(path.relative_to(source)) for path in found)}; name one of these files"
    raise DataError(several if found else "holds no meta_expressions*.json; name that file", source=str(source))
