"""Run-length codes of one clip in a JSON file: SA-V's train set and what SAM 2 gives.

SA-V (sav_dataset/README.md of facebookresearch/sam2): `masklet[i][k]` is the code of object k in the i-th annotated
frame. "Videos are annotated at 6 fps (annotated every 4 frames) while the videos are at 24 fps", so that frame is 4 i.

SAM 2: the answers of its demo's server, `{"frame_index": 3, "results": [{"object_id": 0, "mask": {"size": …, "counts":
…}}]}`, as a JSON list or one a line; or `{frame: {object: code}}`, which is `video_segments` of its notebook.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.importing.clips import Clip, Objects, is_clip
from swim_fast.importing.job import Job
from swim_fast.importing.masks import Masks
from swim_fast.importing.sources import entry, read_json

SAV_EVERY = 4  # frames from one annotation to the next


class _CodeFiles:
    """A JSON file per clip, or a folder of them; clips are beside their files or in `--media`."""

    every = 1
    patterns: tuple[str, ...] = ("*.json", "*.jsonl")  # of the files in a folder

    def __init__(self, job: Job):
        self.job, source = job, Path(job.options.source)
        paths = sorted(path for pattern in self.patterns for path in source.glob(pattern))
        self.files = {self.unit(path.stem): path for path in (paths if source.is_dir() else [source])}
        if not self.files:
            raise DataError(f"holds no {' or '.join(self.patterns)}", source=job.options.source)
        media = job.options.media and Path(job.options.media)
        if len(self.files) == 1 and media and is_clip(media):  # whatever its masks' file is called
            self.files = dict(zip([media.stem], self.files.values(), strict=True))
        self.units = list(self.files)

    def unit(self, stem: str) -> str:
        """Return the name of the unit that a file holds."""
        return stem

    def records(self, unit: str) -> Iterator[dict]:
        """Yield the records of a clip."""
        path = self.files[unit]
        with_codes = self.read(path)
        clip = self.job.open(self.clip_name(unit), path.parent)
        self.check(clip, with_codes, str(path))
        objects = Objects(clip)
        for number, codes in with_codes.items():
            with self.job.noting(name=unit, source=str(path)):
                name = self.job.names.find(unit, number)
                objects.add(name, self._decode(clip, number, codes, unit))
        yield from self.job.records(objects)

    def clip_name(self, unit: str) -> str:
        """Return the name of a unit's clip."""
        return unit

    def read(self, path: Path) -> dict[str, dict[int, Any]]:
        """Return the codes of a file, by object and number of the frame."""
        raise NotImplementedError

    def check(self, clip: Clip, codes: dict[str, dict[int, Any]], source: str) -> None:
        """Raise DataError if the codes of a file are those of another clip."""

    def _decode(self, clip: Clip, number: str, codes: dict[int, Any], unit: str) -> Masks:
        masks = Masks()
        for frame, code in codes.items():
            index = self.job.frame(frame, self.every)
            with self.job.noting(name=unit, key=f"object {number}, frame {index}"):
                clip.check(index, (clip.height, clip.width))
                masks.add_code(index, code, clip.height, clip.width)
        if not len(masks):
            raise DataError("is in no frame of the clip: all its codes are empty or unusable", key=f"object {number}")
        return masks


class SavFiles(_CodeFiles):
    """SA-V: `ID_manual.json` and `ID_auto.json` beside `ID.mp4`; the latter's objects are named under `ID_auto`."""

    every = SAV_EVERY
    patterns = ("**/*_manual.json", "**/*_auto.json")

    def unit(self, stem: str) -> str:  # noqa: D102
        return stem.removesuffix("_manual")

    def clip_name(self, unit: str) -> str:  # noqa: D102
        return unit.removesuffix("_auto")

    def read(self, path: Path) -> dict[str, dict[int, Any]]:  # noqa: D102
        return read_masklet(read_json(path), str(path))

    def check(self, clip: Clip, codes: dict[str, dict[int, Any]], source: str) -> None:
        """A clip that was cut, or encoded at another rate, would have its masks on other frames."""
        every, count = self.job.options.every or self.every, max(map(len, codes.values()), default=0)
        if not (count - 1) * every < clip.num_frames <= (count + 1) * every:
            text = f"has {count} annotated frames, one of {every}, and {clip.path} has {clip.num_frames} frames"
            raise DataError(f"{text}; take the clip as it was published, or see --every", source=source)


def read_masklet(value: dict, source: str) -> dict[str, dict[int, Any]]:
    """Return SA-V's codes by object and index of the annotated frame.

    Raises:
        DataError: another structure.
    """
    try:
        frames = entry(value, "masklet", list)
        numbers = entry(value, "masklet_id", list) if "masklet_id" in value else range(len(frames[0] if frames else ()))
        found: dict[str, dict[int, Any]] = {str(number): {} for number in numbers}
        for index, codes in enumerate(frames):
            if not isinstance(codes, list) or len(codes) != len(found):
                raise DataError(f"is not a list of {len(found)} codes, one per object", key=f"masklet[{index}]")
            for number, code in zip(found, codes, strict=True):
                found[number][index] = code
    except DataError as error:
        raise error.within(source=source) from None
    return found


class Sam2Files(_CodeFiles):
    """SAM 2's masks of a clip in any of the forms above."""

    def check(self, clip: Clip, codes: dict[str, dict[int, Any]], source: str) -> None:  # noqa: D102
        self.job.warn_of_rate(clip, {self.job.frame(frame) for of_object in codes.values() for frame in of_object})

    def read(self, path: Path) -> dict[str, dict[int, Any]]:  # noqa: D102
        value = _read_json_or_lines(path)
        if isinstance(value, dict) and "masklet" in value:
            return read_masklet(value, str(path))
        try:
            return self._of_frames(value) if isinstance(value, list) else self._of_segments(value)
        except DataError as error:
            raise error.within(source=str(path)) from None

    def _of_frames(self, frames: list) -> dict[str, dict[int, Any]]:
        found: dict[str, dict[int, Any]] = {}
        for i, frame in enumerate(frames):
            number = entry(frame, "frame_index", int, f"[{i}].")
            for k, result in enumerate(entry(frame, "results", list, f"[{i}].")):
                key = str(entry(result, "object_id", (int, str), f"[{i}].results[{k}]."))
                found.setdefault(key, {})[number] = result.get("mask")
        return found

    def _of_segments(self, frames: dict) -> dict[str, dict[int, Any]]:
        found: dict[str, dict[int, Any]] = {}
        for frame, objects in frames.items():
            if not (frame.isascii() and frame.isdecimal() and isinstance(objects, dict)):
                raise DataError("is no frame number with {object: code}, nor is this another form of SAM 2", key=frame)
            for number, code in objects.items():
                found.setdefault(number, {})[int(frame)] = code
        return found


def _read_json_or_lines(path: Path) -> Any:
    if path.suffix != ".jsonl":
        return read_json(path, (dict, list))
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read: {error}", source=str(path)) from None
