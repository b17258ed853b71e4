"""The records of VideoRefer-Bench Q and D as prompts of a plain model.

The published form (https://huggingface.co/datasets/DAMO-NLP-SG/VideoRefer-Bench) names the clip under `video`, a file
or a folder of frames. Its questions point at objects by placeholders such as `<object3><region>`, which only models
that take masks can read: here they must be written out in words, as NL-Refer has them, and a record that still holds a
placeholder is refused. `<ins>` tags are removed. `annotation` and `frame_idx`, the masks, are not used.

Also understood: keys in any case (`Question` and `question`); a conversation in place of `Question`, whose first human
turn then is the question, as in the other files of VideoRefer and NL-Refer; `image` in place of `video`; JSON lists and
JSONL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile, read_turns, record_name
from swim_fast.data.source.tags import OBJECT_PLACEHOLDER, strip_tags
from swim_fast.inference.generation import split_answer

Item = TypeVar("Item")

# A sample needs an answer, before which it is then cut.
_STAND_IN_ANSWER = "."


def read_items(
    records: RecordFile, indices: Sequence[int], read: Callable[[RecordFile, dict[str, Any], int], Item]
) -> tuple[dict[int, Item], dict[int, str]]:
    """Read records of a benchmark file: items by record index, and what is wrong with those that cannot be used.

    Args:
        records: the file.
        indices: the records that are meant.
        read: makes the item of a record's entry, whose keys are in lower case; raises DataError.

    Raises:
        DataError: no record can be used; the first one's problem.
    """
    items: dict[int, Item] = {}
    problems: dict[int, str] = {}
    first: DataError | None = None
    for index in indices:
        try:
            entry = records.raw(index)
            try:
                items[index] = read(records, {key.lower(): value for key, value in entry.items()}, index)
            except DataError as error:
                raise error.within(source=str(records.path), record=index, name=record_name(entry)) from None
        except DataError as error:
            problems[index] = str(error)
            first = first or error
    if not items and first is not None:
        raise first.within(key="no record of the file can be used, the first because of")
    return items, problems


def read_question_text(entry: dict[str, Any]) -> str:
    """Return the question of a record in plain words.

    Raises:
        DataError: there is none, or objects are pointed at by placeholders.
    """
    if entry.get("question") is not None:
        text, key = read_text(entry, "question"), "question"
    elif entry.get("conversations") is not None:
        turns, key = read_turns(entry), "conversations"
        text = next((turn.text for turn in turns if turn.role == "user"), "")
    else:
        raise DataError(
            "there is no question, neither under Question nor in conversations; ask about the object in words, as "
            "NL-Refer does: masks are not shown to the model",
            key="Question",
        )
    text = strip_tags(text)[0].replace("<video>", "").replace("<image>", "").strip()
    if not text:
        raise DataError("the question is empty", key=key)
    if found := OBJECT_PLACEHOLDER.search(text):
        raise DataError(
            f"the question points at its object by the placeholder {found.group()}, which a plain model cannot read; "
            "name the object in words instead, as NL-Refer does: `swim-fast nl-refer build` writes such names into "
            "records with conversations",
            key=key,
        )
    return text


def read_text(entry: dict[str, Any], key: str) -> str:
    """Return a text of a record.

    Raises:
        DataError: it is missing, empty or something else.
    """
    value = entry.get(key)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise DataError("is missing or empty", key=key)
    if not isinstance(value, str):
        raise DataError(f"is no text but {type(value).__name__}", key=key)
    return value


def make_record(records: RecordFile, entry: dict[str, Any], index: int, prompt: str) -> Record:
    """Return the record that asks a prompt about the clip of an entry, without masks.

    Raises:
        DataError: no clip, or a prompt that no conversation can hold.
    """
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": _STAND_IN_ANSWER}]
    media = {key: entry[key] for key in ("video", "image") if key in entry}
    name = record_name(entry)
    record = records.parse({**({"index": name} if name else {}), **media, "conversations": turns}, index)
    if record.media is None:
        raise DataError("the record names no clip", key="video")
    return record


def make_prompt(builder: SampleBuilder, record: Record) -> Sample:
    """Return the prompt of a record that `make_record` made.

    Raises:
        DataError: for whatever is wrong with the clip.
    """
    return split_answer(builder(record))[0]
