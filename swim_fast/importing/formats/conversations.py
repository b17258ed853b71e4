"""Conversations without masks: ms-swift and LLaMA-Factory, whose many forms become one.

`messages` (role, content), ShareGPT's `conversations` (from, value) and `conversation` (human, assistant), Alpaca's
`instruction`, `input`, `output`, and `query`, `response`; `system` and `history` beside; one file in `videos` or
`images`. LLaMA-Factory's `dataset_info.json` beside the file may rename columns and roles.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import ROLES, RecordFile, read_turns, record_name
from swim_fast.importing.clips import media_path
from swim_fast.importing.job import Job
from swim_fast.importing.sources import read_json

# What nothing here could use, and leaving out in silence would change what the data says.
UNUSABLE = {
    "objects": "has boxes, which are no masks; make masks of them with SAM 2 first",
    "audios": "has audio",
    "tools": "has tools",
    "rejected_response": "is preference data",
    "rejected": "is preference data",
    "kto_tag": "is preference data",
    "label": "is for classification or KTO",
}
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
COLUMNS = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("instruction", "query"),
    "query": ("input",),
    "response": ("output", "response"),
    "history": ("history",),
    "system": ("system",),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
}


class RecordsOfFile:
    """A JSON list or JSONL file; media are in `--media`, or beside it."""

    def __init__(self, job: Job):
        self.job, self.file = job, RecordFile(job.options.source)
        self.folder = Path(job.options.media or Path(job.options.source).parent)
        self.units = range(len(self.file))


class Conversations(RecordsOfFile):
    """Conversations of ms-swift or LLaMA-Factory."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.columns, self.tags = _description(Path(job.options.source))

    def records(self, unit: int) -> Iterator[dict]:
        """Yield the record."""
        raw = self.file.raw(unit)
        for key, reason in UNUSABLE.items():
            if raw.get(key) not in (None, [], {}, ""):
                raise DataError(f"{reason}: nothing here can use it; leave such records out", key=key)
        entry = {column: self._column(raw, column) for column in COLUMNS}
        turns, shown = self._turns(entry)
        media = {kind: entry[kind + "s"] or shown.get(kind) for kind in ("video", "image")}
        name = {"index": record_name(raw)} if record_name(raw) else {}
        conversations = [{"from": SPEAKERS[role], "value": text} for role, text in turns]
        record = {**name, **one_medium(media, self.job, self.folder), "conversations": conversations}
        if not any(turn.role == "assistant" and turn.text.strip() for turn in read_turns(record)):
            raise DataError("has no answer to train on")
        if raw.get("annotation"):
            record["annotation"] = raw["annotation"]
        if len(record) == 1 + len(name) and any(f"<{kind}>" in text for _, text in turns for kind in media):
            raise DataError("a <video> or <image> placeholder without a video or image")
        self.file.parse(record, unit)
        yield record

    def _column(self, raw: dict, column: str) -> Any:
        names = (str(self.columns[column]),) if column in self.columns else COLUMNS[column]
        return next((raw[name] for name in names if raw.get(name) not in (None, "", [])), None)

    def _turns(self, entry: dict) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return (role, text) of each turn, and media that are parts of a turn."""
        turns: list[tuple[str, str]] = [("system", entry["system"])] if entry["system"] else []
        shown: dict[str, Any] = {}
        if entry["messages"] is not None:
            if not isinstance(entry["messages"], list):
                raise DataError("is no list of turns", key="messages")
            for i, message in enumerate(entry["messages"]):
                turns += self._message(message, f"messages[{i}]", shown)
        elif isinstance(entry["prompt"], str):
            question = "\n".join(text for text in (entry["prompt"], entry["query"]) if isinstance(text, str))
            pairs = entry["history"] or []
            for pair in [*pairs, [question, entry["response"]]] if isinstance(pairs, list) else [None]:
                if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                    raise DataError(f"{pair!r} is no question with its answer", key="response or history")
                turns += zip(("user", "assistant"), pair, strict=True)
        else:
            raise DataError("has neither messages, conversations, instruction nor query; what is it?")
        if len([role for role, _ in turns if role == "system"]) > 1:  # the one in the messages goes first, as in both
            turns = turns[1:]
        return turns, shown

    def _message(self, message: Any, key: str, shown: dict[str, Any]) -> list[tuple[str, str]]:
        if not isinstance(message, dict):
            raise DataError("is no object with role and content", key=key)
        if {"human", "assistant"} <= message.keys():
            pairs = [("user", message["human"]), ("assistant", message["assistant"])]
        else:
            role = message.get(self.tags.get("role_tag", "role"), message.get("from"))
            content = message.get(self.tags.get("content_tag", "content"), message.get("value"))
            speakers = {self.tags[f"{name}_tag"]: name for name in SPEAKERS if f"{name}_tag" in self.tags}
            known = speakers.get(role, ROLES.get(role)) if isinstance(role, str) else None
            if known is None:
                raise DataError(f"unknown speaker {role!r}; known are {', '.join(ROLES)}", key=key)
            pairs = [(known, _text(content, key, shown))]
        for _, text in pairs:
            if not isinstance(text, str):
                raise DataError(f"its content is a {type(text).__name__}, not a text", key=key)
        return pairs


def _text(content: Any, key: str, shown: dict[str, Any]) -> Any:
    """Return the text of a turn; of parts such as `{"type": "video", "video": path}`, with their placeholders."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("video", "image"):
            if shown.get(kind):
                raise DataError(f"a second {kind}; a record has one video or image", key=key)
            shown[kind] = part.get(kind)
            texts.append(f"<{kind}>\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise DataError(f"a part of type {kind!r}; known are text, video and image", key=key)
    return "".join(texts)


def one_medium(entry: dict, job: Job, folder: Path) -> dict[str, str]:
    """Return the one video or image of an entry, `{kind: path}`, with its path as records have it; {} for none.

    Raises:
        DataError: several media, or one that does not exist.
    """
    found = {}
    for kind in ("video", "image"):
        value = entry.get(kind)
        if isinstance(value, list):
            if len(value) > 1:
                raise DataError(f"{len(value)} {kind}s; a record has one video or image", key=kind)
            value = value[0] if value else None
        if value in (None, ""):
            continue
        if not isinstance(value, str):
            raise DataError(f"is a {type(value).__name__}, not a path", key=kind)
        path = folder / value.removeprefix("file://")
        if not path.exists():
            raise DataError(f"{path} does not exist; name the folder that it is in with --media", key=kind)
        found[kind] = media_path(path, job.options.out)
    if len(found) > 1:
        raise DataError("both a video and an image; a record has one of them", key="video")
    return found


def _description(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the columns and tags that `dataset_info.json` beside a file gives it."""
    info = path.parent / "dataset_info.json"
    described = read_json(info).values() if info.is_file() else ()
    of_file = (one for one in described if isinstance(one, dict) and one.get("file_name") == path.name)
    found = next(of_file, {})
    if found.get("ranking"):
        raise DataError("is preference data (ranking), which is not trained on here", source=str(path))
    return found.get("columns") or {}, found.get("tags") or {}
