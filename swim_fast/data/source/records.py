"""Records of VideoRefer, NL-Refer and LLaVA-style files: read by offset, checked one by one."""

from __future__ import annotations

import json
import operator
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swim_fast.data.source.errors import DataError, RecordsChangedError, shown
from swim_fast.data.source.masks import own_size
from swim_fast.data.source.record_index import record_offsets
from swim_fast.data.source.shapes import canonical
from swim_fast.data.source.tags import strip_tags
from swim_fast.errors import printable
from swim_fast.options import Excerpt, Source

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

_REGION = re.compile(r"<region\d*>|<object\d+>")
MAX_PATH, MAX_NAME = 4096, 255  # bytes that file systems take


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: `role` is user, assistant or system, `text` is as written, tags included."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One record as the file has it.

    Attributes:
        source: the file, as the user gave it.
        number: index in the file, from 0 (blank lines do not count).
        name: the record's own `index` or `id`, "" if it has none.
        turns: the conversation; a system turn can only be the first.
        kind: "video", "image" or "text".
        media: the video (file or folder of frames) or image; None for text.
        objects: the i-th belongs to the i-th `<ins>` tag, counted over all turns: frame index -> segmentation, as read
            (see `swim_fast.data.source.masks.read_segmentation`).
        mask_size: height and width to which polygons and codes without a size refer; None: those of the clip.
    """

    source: str
    number: int
    name: str
    turns: tuple[Turn, ...]
    kind: str
    media: Path | None
    objects: tuple[dict[int, Any], ...]
    mask_size: tuple[int, int] | None = None


class RecordFile(Sequence[Record]):
    """The records of a JSON list or JSONL file of any size, by index.

    Only the offsets of the records are held, for large files in a memory map that all processes share; see
    `swim_fast.data.source.record_index`. The file is opened anew for each read; the object may be forked and pickled.

    Indexing raises DataError for a record that is malformed. Iterating stops at the first of those: to continue behind
    them, index in a loop.

    Args:
        path: the file.
        media_root: folder against which relative video and image paths are resolved; by default the file's own.
        excerpt: part of each record that is used.

    Raises:
        DataError: the file is missing, empty, or no JSON.
    """

    def __init__(self, path: str | Path, media_root: str | Path | None = None, excerpt: Excerpt = Excerpt()):
        self.path, self.excerpt = path, excerpt
        self.media_root = Path(path).parent if media_root is None else Path(media_root)
        try:
            self._offsets = record_offsets(Path(path))
        except DataError as error:
            raise DataError(error.reason, source=str(path)) from None
        self._signature = _signature(os.stat(path))

    @classmethod
    def from_source(cls, source: Source) -> RecordFile:
        """Return the records of one file of a mixture. Errors as for the constructor."""
        return cls(source.path, source.media, source.part(Excerpt))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> Record:  # type: ignore[override]  # no slices
        """Read and check one record.

        Raises:
            DataError: malformed JSON; no or malformed conversation; both video and image; annotations that do not
                match the `<ins>` tags in number or have keys that are no frame indices; placeholders for objects left
                in the text; an answer without text; what `canonical` refuses.
            RecordsChangedError: the file was changed or removed since it was opened.
            IndexError: no such record.
        """
        number = self._index(number)
        return self.parse(self.raw(number), number)

    def raw(self, number: int) -> dict:
        """Return one record as the file has it, its contents unchecked.

        Raises:
            DataError: malformed JSON; no JSON object.
            RecordsChangedError, IndexError: as for indexing.
        """
        number = self._index(number)
        try:
            return self._read(number)
        except DataError as error:
            raise error.within(source=str(self.path), record=number, name="") from None

    def entry(self, number: int) -> dict:
        """Return one record in NL-Refer's shape, see `canonical`; its contents are unchecked otherwise.

        Raises:
            DataError: as for `raw` and `canonical`.
            RecordsChangedError, IndexError: as for indexing.
        """
        raw = self.raw(number)
        try:
            return canonical(raw, self.excerpt.use_tags)
        except DataError as error:
            raise error.within(source=str(self.path), record=self._index(number), name=record_name(raw)) from None

    def parse(self, entry: dict, number: int) -> Record:
        """Check an entry as if it were record `number` of the file.

        Raises:
            DataError: as for indexing.
        """
        name = record_name(entry)
        try:
            return _record(entry, str(self.path), number, name, self.media_root, self.excerpt)
        except DataError as error:
            raise error.within(source=str(self.path), record=number, name=name) from None

    def _index(self, number: int) -> int:
        number = operator.index(number)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, there is no number {number}")
        return number

    def _read(self, number: int) -> dict:
        start, end = map(int, self._offsets[number])
        try:
            with open(self.path, "rb", buffering=0) as file:
                changed = _signature(os.fstat(file.fileno())) != self._signature
                file.seek(start)
                raw = file.read(end - start)
        except OSError as error:
            raise RecordsChangedError(
                f"{self.path}: cannot be read any longer: {error.strerror}; start again"
            ) from None
        if changed:
            raise RecordsChangedError(f"{self.path}: the file was changed while it was in use; start again")
        try:
            entry = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 at byte {start + error.start} of the file; save it as UTF-8") from None
        except json.JSONDecodeError as error:
            offset = start + len(error.doc[: error.pos].encode())
            raise DataError(f"malformed JSON at byte {offset} of the file: {error.msg}") from None
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"malformed JSON: {error}") from None
        if not isinstance(entry, dict):
            raise DataError(f"is a JSON {type(entry).__name__}, not an object with conversations")
        return entry

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_offsets": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._offsets = record_offsets(Path(self.path))
        self._signature = state["_signature"]


def _distinct(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DataError(f"the key {shown(twice)} occurs twice in one object, of which JSON keeps one; remove the other")
    return found


def _signature(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def record_name(entry: dict) -> str:
    """Return a record's own name, "" if it has none."""
    value = entry.get("index", entry.get("id"))
    return printable(str(value)[:200]) if isinstance(value, str | int) else ""


def _record(entry: dict, source: str, number: int, name: str, media_root: Path, excerpt: Excerpt) -> Record:
    entry = canonical(entry, excerpt.use_tags)
    turns = read_turns(entry)
    kind, media = read_media(entry, media_root)
    _refuse_placeholders(turns)
    objects = _objects(entry, turns) if excerpt.use_tags else ()
    if objects and kind == "text":
        raise DataError("the record has masks but neither video nor image", key="annotation")
    if excerpt.turns is not None:
        turns = _first_exchanges(turns, excerpt.turns)
        objects = objects[: _count_tags(turns)]
    if not excerpt.use_tags:
        turns = tuple(_without_tags(index, turn) for index, turn in enumerate(turns))
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError("the answer is empty: give one, or remove the turn", key=f"conversations[{index}]")
    return Record(source, number, name, turns, kind, media, objects, own_size(entry) if objects else None)


def _first_exchanges(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    """Return the turns before exchange `count`, each of which begins where the user speaks after somebody else."""
    speakers = ["", *(turn.role for turn in turns)]
    begins = [i for i in range(len(turns)) if speakers[i + 1] == "user" and speakers[i] != "user"]
    return turns[: begins[count]] if count < len(begins) else turns


def _without_tags(index: int, turn: Turn) -> Turn:
    try:
        return Turn(turn.role, strip_tags(turn.text)[0])
    except DataError as error:
        raise error.within(key=f"conversations[{index}]") from error


def _count_tags(turns: tuple[Turn, ...]) -> int:
    return sum(turn.text.count("<ins>") for turn in turns)


def read_turns(entry: dict) -> tuple[Turn, ...]:
    """Return the conversation of a raw record.

    Raises:
        DataError: it is missing or malformed.
    """
    conversations = entry.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError(
            'is missing or empty; expected a list of {"from": "human" | "gpt", "value": text}, or messages, or query '
            "and response",
            key="conversations",
        )
    turns = []
    for index, turn in enumerate(conversations):
        key = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise DataError('is not an object {"from": …, "value": …}', key=key)
        role, text = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f'unknown speaker "from": {shown(role)}; known are {", ".join(ROLES)}', key=key)
        if role == "system" and index:
            raise DataError("a system turn is allowed only as the first", key=key)
        if not isinstance(text, str):
            raise DataError(f'"value" is {"missing" if text is None else "no string"}', key=key)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError('"value" holds half a surrogate pair (\\ud800 …); repair the text', key=key) from None
        turns.append(Turn(ROLES[role], text))
    return tuple(turns)


def read_media(entry: dict, media_root: Path) -> tuple[str, Path | None]:
    """Return what a raw record shows, "video", "image" or "text", and its path, which need not exist.

    Raises:
        DataError: several of them, or what is no path.
    """
    found = {}
    for kind in ("video", "image"):
        value = entry.get(kind)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None or value in ("", []):
            continue
        if isinstance(value, list):
            raise DataError(f"{len(value)} {kind}s in one record; one is supported", key=kind)
        if not isinstance(value, str):
            raise DataError(f"is not a path but {type(value).__name__}", key=kind)
        found[kind] = media_root / _checked_path(value, kind)
    if len(found) > 1:
        raise DataError("the record has both a video and an image; one of them is supported", key="video")
    return next(iter(found.items()), ("text", None))


def _checked_path(text: str, key: str) -> str:
    """Return a path that a file system can be asked for."""
    text = text.removeprefix("file://")
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:
        raise DataError("the path holds half a surrogate pair (\\ud800 …); repair it", key=key) from None
    if b"\0" in path:
        raise DataError("the path holds a NUL character; remove it", key=key)
    if len(path) > MAX_PATH or max(map(len, path.split(b"/"))) > MAX_NAME:
        raise DataError(f"a path of {len(path):,} bytes is longer than file systems take", key=key)
    return text


def _refuse_placeholders(turns: tuple[Turn, ...]) -> None:
    for index, turn in enumerate(turns):
        if not (found := _REGION.search(turn.text)):
            continue
        if _count_tags(turns):
            raise DataError(
                f"the placeholder {found.group()[:30]} beside <ins> tags would be trained on; write out the noun",
                key=f"conversations[{index}]",
            )
        raise DataError(
            "this is a raw VideoRefer record: its text holds <object…><region> placeholders instead of tagged nouns; "
            "turn the file into NL-Refer first",
            key="conversations",
        )


def _objects(entry: dict, turns: tuple[Turn, ...]) -> tuple[dict[int, Any], ...]:
    annotation = entry.get("annotation")
    if annotation is None:
        annotation = []
    if not isinstance(annotation, list):
        raise DataError(f"is a {type(annotation).__name__}, not a list with one entry per <ins> tag", key="annotation")
    tags = _count_tags(turns)
    if tags != len(annotation):
        raise DataError(
            f"the conversation has {tags} <ins> tags but there are {len(annotation)} annotations; the i-th annotation "
            "belongs to the i-th tag",
            key="annotation",
        )
    return tuple(_frames(value, f"annotation[{index}]") for index, value in enumerate(annotation))


def _frames(value: Any, key: str) -> dict[int, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f'is a {type(value).__name__}, not an object {{"frame number": segmentation}}', key=key)
    frames = {}
    for frame, segmentation in value.items():
        where = f"{key}[{shown(frame)}]"
        if not (frame.isascii() and frame.isdigit() and len(frame) <= 12):
            raise DataError("the key is not a frame number of the video (0, 1, 2 …)", key=where)
        if int(frame) in frames:
            raise DataError(f"frame number {int(frame)} occurs twice", key=where)
        frames[int(frame)] = segmentation
    return frames
