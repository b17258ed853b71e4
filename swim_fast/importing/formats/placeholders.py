"""VideoRefer and PixelRefer: conversations in which `<object1><region>` or `<region>` stand for an object with masks.

VideoRefer has them in `annotation`, one `{frame: {"segmentation": …}}` per object. PixelRefer has them in `masks`, one
`{frame: code}` per object of a video, or a code or polygons per object of an image, with `height` and `width`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import read_turns
from swim_fast.importing.formats.conversations import RecordsOfFile, one_medium
from swim_fast.importing.masks import Masks
from swim_fast.nl_refer.english.rules import UnclearError, name_objects
from swim_fast.nl_refer.placeholders import check_rest, find_task, replace_placeholders
from swim_fast.nl_refer.validation import RejectedError, check_expressions


class Placeholders(RecordsOfFile):
    """Records whose placeholders become tagged nouns, by the rules of `swim-fast nl-refer build`."""

    def records(self, unit: int) -> Iterator[dict]:
        """Yield the record."""
        raw = self.file.raw(unit)
        medium = one_medium(raw, self.job, self.folder)
        entry = {key: value for key, value in raw.items() if key not in ("masks", "height", "width")} | medium
        if raw.get("masks"):
            entry["annotation"] = _annotation(raw["masks"], "image" in medium, (raw.get("height"), raw.get("width")))
        yield entry if self.job.options.placeholders == "keep" else self._named(entry, unit)

    def _named(self, entry: dict, unit: int) -> dict:
        task = find_task(entry, unit)
        if task is None:
            entry = entry if any("<ins>" in turn.text for turn in read_turns(entry)) else entry | {"annotation": []}
            self.file.parse(entry, unit)
            return entry
        check_rest(self.file, entry, task)
        try:
            expressions = name_objects(task.mentions())
            check_expressions(task, expressions)
        except (UnclearError, RejectedError) as error:
            remedy = "import with --placeholders keep, and let a language model name it: swim-fast nl-refer build"
            raise DataError(f"{error}; {remedy}", key="conversations") from None
        return replace_placeholders(entry, task, expressions)


def _annotation(masks: Any, is_image: bool, size: tuple[Any, Any]) -> list[dict]:
    """Return PixelRefer's masks as VideoRefer's annotation."""
    if not isinstance(masks, list):
        raise DataError(f"is a {type(masks).__name__}, not a list with the masks of each object", key="masks")
    found = []
    for i, frames in enumerate(masks):
        frames = {"0": frames} if is_image else frames
        if not isinstance(frames, dict):
            raise DataError('is no object {"frame number": mask}', key=f"masks[{i}]")
        found.append(
            {str(frame): {"segmentation": _coded(mask, size, f"masks[{i}]")} for frame, mask in frames.items()}
        )
    return found


def _coded(mask: Any, size: tuple[Any, Any], key: str) -> Any:
    """Return a mask; polygons, which are in pixels of the record's own size, as a run-length code of that size."""
    if not isinstance(mask, list) or not all(type(side) is int and side > 0 for side in size):
        return mask
    try:
        masks = Masks()
        masks.add_code(0, mask, *size)
        return masks.annotation().get("0", {}).get("segmentation")
    except DataError as error:
        raise error.within(key=key) from None
