"""What the records of VideoRefer-Bench Q and D have in common, and how they are read.

The published form (https://huggingface.co/datasets/DAMO-NLP-SG/VideoRefer-Bench) names the clip under ``video``, a file
or a folder of frames. Its questions point at objects by placeholders such as ``<object3><region>``, which only models
that take masks can read: here they must be written out in words, as NL-Refer has them, and a record that still holds a
placeholder is refused. ``<ins>`` tags are removed. ``annotation`` and ``frame_idx``, the masks, are not used.

Also understood: keys in any case (``Question`` and ``question``); a conversation in the place of ``Question``, whose
first human turn then is the question, as in the other files of VideoRefer and NL-Refer; ``image`` in the place of
``video``; JSON lists and JSONL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile, read_turns, record_name
from swim_fast.data.source.tags import OBJECT_PLACEHOLDER, strip_tags
from swim_fast.inference.generation import prompt_and_answer

Item = TypeVar("Item")

# A sample needs an answer, before which it is then cut.
_STAND_IN_ANSWER = "."


def read_items(
    records: RecordFile, count: int, read: Callable[[RecordFile, dict[str, Any], int], Item]
) -> tuple[dict[int, Item], dict[int, str]]:
    """The first records of a benchmark file by number, and what is wrong with those that cannot be used.

    Args:
        records: the file.
        count: how many of its records.
        read: makes the item of a record's entry; raises DataError.

    Raises:
        DataError: no record can be used; the first one's problem.
    """
    items: dict[int, Item] = {}
    problems: dict[int, str] = {}
    first: DataError | None = None
    for number in range(count):
        try:
            entry = records.raw(number)
            try:
                items[number] = read(records, {key.lower(): value for key, value in entry.items()}, number)
            except DataError as error:
                raise error.within(source=str(records.path), record=number, name=record_name(entry)) from None
        except DataError as error:
            problems[number] = str(error)
            first = first or error
    if not items and first is not None:
        raise first.within(key="no record of the file can be used, the first because of")
    return items, problems


def question_of(entry: dict[str, Any]) -> str:
    """The question of a record in plain words.

    Args:
        entry: with its keys in lower case.

    Raises:
        DataError: there is none, or objects are pointed at by placeholders.
    """
    if entry.get("question") is not None:
        text, key = text_under(entry, "question"), "question"
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


def text_under(entry: dict[str, Any], key: str) -> str:
    """A text of a record.

    Raises:
        DataError: it is missing, empty or something else.
    """
    value = entry.get(key)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise DataError("is missing or empty", key=key)
    if not isinstance(value, str):
        raise DataError(f"is no text but {type(value).__name__}", key=key)
    return value


def prompt_record(records: RecordFile, entry: dict[str, Any], number: int, prompt: str) -> Record:
    """The record that asks a prompt about the clip of an entry, without masks.

    Raises:
        DataError: no clip, or a prompt that no conversation can hold.
    """
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": _STAND_IN_ANSWER}]
    media = {key: entry[key] for key in ("video", "image") if key in entry}
    name = record_name(entry)
    record = records.parse({**({"index": name} if name else {}), **media, "conversations": turns}, number)
    if record.media is None:
        raise DataError("the record names no clip", key="video")
    return record


def prompt_sample(builder: SampleBuilder, record: Record) -> Sample:
    """What the model is given of a `prompt_record`.

    Raises:
        DataError: for whatever is wrong with the clip.
    """
    return prompt_and_answer(builder(record))[0]
