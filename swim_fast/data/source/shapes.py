"""Records of other projects' shapes, read as NL-Refer's: `conversations`, `video` or `image`, `annotation`.

Known are `messages` (role and content, also with content parts), ShareGPT's `conversation`, ms-swift's `query`,
`response`, `history` and `system`, `videos` and `images` of one medium, and PixelRefer's `masks`. What looks like masks
or media under any other key is refused: it is never passed over silently.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from swim_fast.data.source.errors import DataError, shown

_TURNS = ("conversations", "messages", "conversation", "query")
_MASKS = ("annotation", "masks")
_MEDIA = {"video": ("video", "videos"), "image": ("image", "images")}
_UNREAD_MEDIA = ("audio", "audios", "masked_video")
_LIKE_MASKS = re.compile(r"mask|segm|annot|polygon|rle|bbox|boxes|^objects?$", re.IGNORECASE)
_LIKE_MEDIA = re.compile(r"video|image|clip|media|frame|img|pic", re.IGNORECASE)
_MEDIA_FILE = re.compile(r"\.(?:mp4|mkv|webm|avi|mov|m4v|gif|jpe?g|png|bmp|tiff?|webp)$", re.IGNORECASE)
_PART_OF_CLIP = ("video_start", "video_end", "start_time", "end_time")


def canonical(entry: dict, use_masks: bool = True) -> dict:
    """Return a record in NL-Refer's shape; one that has it already is returned as it is.

    Args:
        entry: the record as its file has it.
        use_masks: read masks; without, keys that hold them are not looked at.

    Raises:
        DataError: two keys for one thing, a shape that is not supported, and masks or media under an unknown key.
    """
    known, media = dict(entry), {"video": [], "image": []}
    turns = _one_of(entry, _TURNS)
    if turns is not None:
        known["conversations"] = list(_read_turns(entry, turns, media))
    if entry.get("system") and turns is not None:
        first = known["conversations"][:1]
        if not isinstance(entry["system"], str) or (isinstance(first[0], dict) and first[0].get("from") == "system"):
            raise DataError("is no text, or a second system turn; keep one", key="system")
        known["conversations"].insert(0, {"from": "system", "value": entry["system"]})
    for kind, keys in _MEDIA.items():
        key = _one_of(entry, keys)
        if key is not None:
            value = entry[key] if isinstance(entry[key], list) else [entry[key]]
            named = {path for path in value if isinstance(path, str)}
            more = [path for path in media[kind] if not isinstance(path, str) or path not in named]
            media[kind] = [*map(_path, value), *more]
        if media[kind]:
            known[kind] = media[kind][0] if len(media[kind]) == 1 else media[kind]
    for key in ("messages", "conversation", "query", "response", "history", "system", "videos", "images"):
        known.pop(key, None)
    if use_masks:
        _read_masks(entry, known)
    _refuse_unread(entry, known, use_masks)
    return entry if known == entry else known


def _one_of(entry: dict, keys: tuple[str, ...]) -> str | None:
    """Return the one of some keys that holds something."""
    found = [key for key in keys if entry.get(key)]
    if len(found) > 1:
        raise DataError(f"the record has both {found[0]} and {found[1]}; keep one of them", key=found[1])
    return found[0] if found else None


def _path(value: Any) -> Any:
    return value["path"] if isinstance(value, dict) and set(value) <= {"path", "bytes"} and value.get("path") else value


def _read_turns(entry: dict, key: str, media: dict[str, list]) -> Iterator[Any]:
    """Yield the turns as `{"from", "value"}`, and collect the media that are named in them."""
    if key == "query":
        history = entry.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise DataError("is no list of pairs of query and response", key="history")
        for asked, answered in [*history, (entry["query"], entry.get("response"))]:
            yield {"from": "human", "value": asked}
            if answered is not None:
                yield {"from": "gpt", "value": answered}
        return
    turns = entry[key]
    if not isinstance(turns, list):
        raise DataError(f"is a {type(turns).__name__}, not a list of turns", key=key)
    for index, turn in enumerate(turns):
        where = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise DataError('is not an object {"from": …, "value": …}', key=where)
        if turn.get("loss") is False or turn.get("weight") == 0:
            raise DataError("a turn that is not to be trained on is not supported; remove loss or weight", key=where)
        if "from" in turn or "value" in turn:
            yield turn
        elif "role" in turn or "content" in turn:
            content = turn.get("content")
            text = _join_parts(content, media, where) if isinstance(content, list) else content
            yield {"from": turn.get("role"), "value": text}
        elif key == "conversation" and set(turn) <= {"human", "assistant"}:
            yield {"from": "human", "value": turn.get("human")}
            yield {"from": "gpt", "value": turn.get("assistant")}
        else:
            yield turn


def _join_parts(parts: list, media: dict[str, list], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type", next(iter(part), None)) if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        if kind not in ("video", "image"):
            raise DataError(
                f"content of type {shown(kind)} is not supported; known are text, video and image",
                key=f"{where}.content[{index}]",
            )
        if any(part.get(key) is not None for key in _PART_OF_CLIP):
            raise DataError("a part of a clip is not supported; cut the clip", key=f"{where}.content[{index}]")
        path = part.get(kind, part.get("path", part.get("url")))
        if path is not None:
            media[kind].append(path)
        texts.append(f"<{kind}>")
    return "".join(texts)


def _read_masks(entry: dict, known: dict) -> None:
    """Put the masks under `annotation`, those of an image under frame 0."""
    key = _one_of(entry, _MASKS)
    if key is None:
        return
    objects = entry[key]
    known.pop("masks", None)
    if known.get("image") and not known.get("video") and isinstance(objects, list):
        objects = [{"0": value} if _is_segmentation(value) else value for value in objects]
    known["annotation"] = objects


def _is_segmentation(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and not any(key.isdigit() for key in value)
    return isinstance(value, list)


def _refuse_unread(entry: dict, known: dict, use_masks: bool) -> None:
    has_media = bool(known.get("video") or known.get("image"))
    for key, value in entry.items():
        if not value or key in ("annotation", "conversations", "conversation", "messages", "history", "masks"):
            continue
        if key in _UNREAD_MEDIA or (not has_media and _LIKE_MEDIA.search(key) and _names_file(value)):
            raise DataError("names media that would not be read; the keys are video and image", key=key)
        if use_masks and _holds_masks(key, value):
            raise DataError(
                "may hold masks that would not be read; put them under annotation, one entry per <ins> tag, or remove "
                "the key",
                key=key,
            )


def _names_file(value: Any) -> bool:
    value = value[0] if isinstance(value, list) else value
    return isinstance(value, str) and bool(_MEDIA_FILE.search(value[-10:]))


def _holds_masks(key: str, value: Any) -> bool:
    """Tell by its name whether a key holds masks; a list of words, such as of object names, does not."""
    if not isinstance(value, dict | list) or (isinstance(value, list) and isinstance(value[0], str)):
        return False
    return bool(_LIKE_MASKS.search(key[:100]) or difflib.get_close_matches(key[:20].lower(), _MASKS, cutoff=0.8))
