"""Conversations: ms-swift's and LLaMA-Factory's, in any of the shapes that records are read in.

Beside those, Alpaca's `instruction`, `input` and `output`, and what LLaMA-Factory's `dataset_info.json` beside the file
says about it: `columns` (what the keys are called) and `tags` (what role and text of a turn, and the speakers, are).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile, read_media, read_turns
from swim_fast.data.source.shapes import canonical
from swim_fast.importing.clips import media_path
from swim_fast.importing.job import Job
from swim_fast.importing.sources import dig, exists, read_json

# What nothing here could use, and leaving out in silence would change what the data says.
UNUSABLE = {
    "objects": "has boxes, which are no masks; make masks of them with SAM 2 first",
    "tools": "has tools",
    "rejected_response": "is preference data",
    "rejected": "is preference data",
    "kto_tag": "is preference data",
    "label": "is for classification or KTO",
}
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
# LLaMA-Factory's columns and their usual names; what they are called here.
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
COLUMNS |= {"messages": "conversations", "images": "images", "videos": "videos"}


class RecordsOfFile:
    """A JSON list or JSONL file; media are in `--media`, or beside it."""

    def __init__(self, job: Job):
        self.job, self.file = job, RecordFile(job.options.source)
        self.folder = Path(job.options.media or Path(job.options.source).parent)
        self.units = range(len(self.file))

    def read(self, entry: dict) -> dict:
        """Return an entry in the shape of records, with the path of its medium as they have it.

        Raises:
            DataError: another shape, several media, or one that does not exist.
        """
        entry = canonical(entry)
        kind, path = read_media(entry, self.folder)
        rest = {key: value for key, value in entry.items() if key not in ("video", "image")}
        if path is None:
            return rest
        if not exists(path):
            raise DataError(f"{path} does not exist; name the folder that it is in with --media", key=kind)
        return rest | {kind: media_path(path, self.job.options.out)}


class Conversations(RecordsOfFile):
    """Conversations of ms-swift or LLaMA-Factory."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.columns, self.tags = _description(Path(job.options.source))

    def records(self, unit: int) -> Iterator[dict]:
        """Yield the record."""
        raw = self._renamed(self.file.raw(unit))
        for key, reason in UNUSABLE.items():
            if raw.get(key) not in (None, [], {}, ""):
                raise DataError(f"{reason}: nothing here can use it; leave such records out", key=key)
        entry = self.read(raw)
        turns = read_turns(entry)
        if not any(turn.role == "assistant" for turn in turns):
            raise DataError("has no answer to train on")
        shown = [kind for kind in ("video", "image") for turn in turns if f"<{kind}>" in turn.text]
        if shown and not entry.keys() & {"video", "image"}:
            raise DataError(f"a <{shown[0]}> placeholder without a video or image")
        kept = ("index", "id", "video", "image", "annotation", "height", "width")
        record = {key: entry[key] for key in kept if key in entry}
        record["conversations"] = [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in turns]
        self.file.parse(record, unit)
        yield record

    def _renamed(self, raw: dict) -> dict:
        """Return a record with the keys that `canonical` knows: those of the description, and Alpaca's."""
        names = {column: str(self.columns.get(column, usual)) for column, usual in COLUMNS.items()}
        if "messages" in self.columns or self.tags:
            turns = raw.get(names["messages"])
            turns = [self._turn(turn) for turn in turns] if isinstance(turns, list) else turns
            given = {key: raw.get(names[key]) for key in ("system", "images", "videos")}
            renamed = {key: value for key, value in raw.items() if key not in names.values()}
            return renamed | given | {"conversations": turns}
        if (asked := raw.get(names["prompt"])) is None:
            return raw
        more = raw.get(names["query"])
        question = f"{asked}\n{more}" if isinstance(asked, str) and isinstance(more, str) and more else asked
        given = {key: raw.get(names[key]) for key in ("response", "history", "system", "images", "videos")}
        return {key: value for key, value in raw.items() if key not in names.values()} | given | {"query": question}

    def _turn(self, turn: Any) -> Any:
        """Return a turn with the speaker's usual name, and under the usual keys."""
        if not isinstance(turn, dict):
            return turn
        role = turn.get(self.tags.get("role_tag", "from"), turn.get("role"))
        speakers = {str(self.tags[f"{name}_tag"]): name for name in SPEAKERS if f"{name}_tag" in self.tags}
        text = turn.get(self.tags.get("content_tag", "value"), turn.get("content"))
        return {"role": speakers.get(role, role) if isinstance(role, str) else role, "content": text}


def _description(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns and tags that `dataset_info.json` beside a file gives it."""
    info = path.parent / "dataset_info.json"
    described = read_json(info).values() if info.is_file() else ()
    found = next((one for one in described if dig(one, "file_name") == path.name), {})
    if found.get("ranking"):
        raise DataError("is preference data (ranking), which is not trained on here", source=str(path))
    columns, tags = (found.get(key) if isinstance(found.get(key), dict) else {} for key in ("columns", "tags"))
    return columns, {key: str(value) for key, value in tags.items()}
