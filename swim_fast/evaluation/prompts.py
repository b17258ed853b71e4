"""The records of VideoRefer-Bench Q and D as prompts of a plain model.

Two forms of the files are about. The *raw* one (https://huggingface.co/datasets/DAMO-NLP-SG/VideoRefer-Bench) points at
objects by placeholders such as `<object3><region>`, or asks nothing at all (Bench-D): only models that take masks can
read it, and its records are refused. The *refined* one (`bench/refined-VideoRefer-Bench-*.json` of
https://huggingface.co/datasets/BBBBCHAN/NL-Refer) names them in words, the noun tagged: its tags are removed, wherever
they stand. Both name the clip under `video`, a file or a folder of frames; `annotation` and `frame_idx`, the masks, are
not used.

Also understood: questions in words without tags; keys in any case (`Question` and `question`); a conversation in place
of `Question`, whose first human turn then is the question, as in refined Bench-D; `image` in place of `video`; JSON
lists and JSONL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile, read_turns, record_name
from swim_fast.data.source.tags import OBJECT_PLACEHOLDER, strip_tags
from swim_fast.inference.generation import split_answer

Item = TypeVar("Item")

# The remedy for records of the raw benchmark; `nl-refer build` cannot read them.
_TAKE_REFINED = (
    "this is the raw benchmark, for models that take masks; take the refined file that NL-Refer ships "
    "(bench/refined-VideoRefer-Bench-Q.json and -D.json), or name the object in words"
)

# A sample needs an answer, before which it is then cut.
_STAND_IN_ANSWER = "."


def read_items(
    records: RecordFile, indices: Sequence[int], read: Callable[[RecordFile, dict[str, Any], int], Item]
) -> tuple[dict[int, Item], dict[int, str], str]:
    """Read records of a benchmark file.

    Args:
        records: the file.
        indices: the records that are meant.
        read: makes the item of a record's entry, whose keys are in lower case; raises DataError.

    Returns:
        Items by record index; record index -> what is wrong with those that cannot be used; the kind of file, in words:
        refined, raw or plain, whichever most of its records are, and how many are which.

    Raises:
        DataError: no record can be used; the first one's problem.
    """
    items: dict[int, Item] = {}
    problems: dict[int, str] = {}
    first: DataError | None = None
    kinds: Counter[str] = Counter()
    for index in indices:
        try:
            entry = records.raw(index)
            lower = {key.lower(): value for key, value in entry.items()}
            kinds[_kind(lower)] += 1
            try:
                items[index] = read(records, lower, index)
            except DataError as error:
                raise error.within(source=str(records.path), record=index, name=record_name(entry)) from None
        except DataError as error:
            problems[index] = str(error)
            first = first or error
    if not items and first is not None:
        raise first.within(key="no record of the file can be used, the first because of")
    return items, problems, _describe_kinds(kinds)


def _kind(entry: dict[str, Any]) -> str:
    """Tell a record of the refined benchmark from one of the raw benchmark, and both from words without tags."""
    asked = str(entry.get("question") or entry.get("conversations") or "")
    if "<ins>" in asked:
        return "refined"
    return "plain" if asked and not OBJECT_PLACEHOLDER.search(asked) else "raw"


def _describe_kinds(kinds: Counter[str]) -> str:
    what = {"refined": "tagged nouns", "raw": "placeholders or no question", "plain": "words without tags"}
    counts = ", ".join(f"{kinds[kind]} with {text}" for kind, text in what.items() if kinds[kind])
    return f"{kinds.most_common(1)[0][0]} benchmark file: {counts}"


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
            f"there is no question, neither under Question nor in conversations: {_TAKE_REFINED}", key="Question"
        )
    text = strip_tags(text)[0].replace("<video>", "").replace("<image>", "").strip()
    if not text:
        raise DataError("the question is empty", key=key)
    if found := OBJECT_PLACEHOLDER.search(text):
        raise DataError(
            f"the question points at its object by the placeholder {found.group()}, which a plain model cannot read: "
            f"{_TAKE_REFINED}",
            key=key,
        )
    return text


def read_text(entry: dict[str, Any], key: str) -> str:
    """Return a text of a record as the file has it.

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
