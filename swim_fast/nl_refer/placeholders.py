"""VideoRefer's placeholders: found in a record, bound to their masks, and replaced by tagged expressions.

A placeholder is ``<object1><region>``, ``<object1>`` or ``<region>`` in a human turn. Each becomes one ``<ins>`` tag,
and as the i-th tag owns ``annotation[i]``, the annotations are dealt out anew: an object that is named twice gets its
masks twice, one that no placeholder names is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile, Turn, read_turns, record_name

PLACEHOLDER = re.compile(r"<object\d*>\s*<region>|<region>|<object\d+>")
BINDINGS = ("number", "order")

_DETERMINERS = frozenset("a an the this that these those his her its their our your my".split())


@dataclass(frozen=True)
class Expression:
    """A referring expression without tags, and the one word of it that is to be tagged."""

    text: str
    noun: str


@dataclass(frozen=True)
class Placeholder:
    """Characters ``[start, end)`` of a turn that stand for the object of ``annotation[object]``."""

    turn: int
    start: int
    end: int
    object: int


@dataclass(frozen=True)
class Task:
    """A raw record whose placeholders want expressions.

    Attributes:
        number: place of the record in its file.
        name: the record's own name, "" if it has none.
        turns: the conversation as written.
        placeholders: in the order in which they are read, one expression is due for each.
        unnamed: how many objects have masks but no placeholder.
        contested: whether the numbers of the placeholders bind them to other masks than their order does.
    """

    number: int
    name: str
    turns: tuple[Turn, ...]
    placeholders: tuple[Placeholder, ...]
    unnamed: int
    contested: bool

    def answer_to(self, turn: int) -> str:
        """What is answered to a human turn, "" if nothing is."""
        following = self.turns[turn + 1 : turn + 2]
        return following[0].text if following and following[0].role == "assistant" else ""


def find_task(entry: dict, number: int, binding: str = "number") -> Task | None:
    """What there is to rewrite in a raw record; None if its conversation has no placeholder.

    Args:
        entry: the record, as read from JSON.
        number: its place in the file.
        binding: "number": ``<objectN>`` is the N-th annotation (counted from 0 if the record has an ``<object0>``, from
            1 otherwise; where the record has as many annotations as different numbers, they are simply in the same
            order), and a bare ``<region>`` takes the next annotation that no number claims. "order": as VideoRefer's
            own model reads them: the object that comes up first has the first annotation, whatever its number.

    Raises:
        DataError: no proper conversation; a placeholder in an answer or system turn; ``<ins>`` tags beside
            placeholders; placeholders without annotation.
    """
    turns, name = read_turns(entry), record_name(entry)
    found = [(i, match) for i, turn in enumerate(turns) for match in PLACEHOLDER.finditer(turn.text)]
    if not found:
        return None
    for i, match in found:
        if turns[i].role != "user":
            raise DataError(
                f"the placeholder {match.group()} stands in an answer, which must stay as it is; write out the name",
                key=f"conversations[{i}]",
            )
    if any("<ins>" in turn.text for turn in turns):
        raise DataError("the conversation has both <ins> tags and placeholders; keep one of them", key="conversations")
    annotation = entry.get("annotation")
    count = len(annotation) if isinstance(annotation, list) else 0
    numbers = [_number(match.group()) for _, match in found]
    objects, others = _by_number(numbers, count), _by_order(numbers)
    if binding == "order":
        objects, others = others, objects
    if objects is None or max(objects) >= count:
        names = ", ".join(match.group() for _, match in found)
        raise DataError(f"the placeholders {names} cannot be bound to {count} annotations", key="annotation")
    places = (Placeholder(i, *match.span(), k) for (i, match), k in zip(found, objects, strict=True))
    return Task(number, name, turns, tuple(places), count - len(set(objects)), objects != others)


def check_rest(records: RecordFile, entry: dict, task: Task) -> None:
    """Hold the rest of a raw record against what its file promises, before anything is spent on its placeholders.

    Raises:
        DataError: what would still be wrong with the record once its placeholders are replaced.
    """
    stand_ins = [Expression("object", "object")] * len(task.placeholders)
    records.parse(replaced(entry, task, stand_ins), task.number)


def _number(placeholder: str) -> int | None:
    digits = re.search(r"\d+", placeholder)
    return int(digits.group()) if digits else None


def _by_order(numbers: Sequence[int | None]) -> list[int]:
    known: dict[int, int] = {}
    objects, following = [], 0
    for number in numbers:
        if number in known:
            objects.append(known[number])
            continue
        objects.append(following)
        if number is not None:
            known[number] = following
        following += 1
    return objects


def _by_number(numbers: Sequence[int | None], count: int) -> list[int] | None:
    distinct = sorted({number for number in numbers if number is not None})
    bare = numbers.count(None)
    if not bare and len(distinct) == count:
        return [distinct.index(number) for number in numbers]
    first = 0 if 0 in distinct else 1
    free = [k for k in range(count) if k + first not in distinct]
    if bare > len(free) or any(number - first >= count for number in distinct):
        return None
    following = iter(free)
    return [next(following) if number is None else number - first for number in numbers]


def noun_place(expression: Expression) -> tuple[int, int] | None:
    """Characters of the expression that are its noun, as a word of its own; None if it does not occur."""
    match = re.search(rf"(?<![\w-]){re.escape(expression.noun)}(?![\w-])", expression.text, re.IGNORECASE)
    return match.span() if match else None


def replaced(entry: dict, task: Task, expressions: Sequence[Expression]) -> dict[str, Any]:
    """The record with tagged expressions for its placeholders; nothing else of the conversation changes.

    An article is left out where the question has one already, the first letter is capital where a sentence begins, and
    a space is added where a word would touch the question's.

    Args:
        entry, task: the raw record and what `find_task` found in it.
        expressions: one per placeholder, each with its noun in it.
    """
    pieces: dict[int, list[str]] = {}
    ends: dict[int, int] = {}
    for place, expression in zip(task.placeholders, expressions, strict=True):
        text = task.turns[place.turn].text
        before = text[ends.get(place.turn, 0) : place.start]
        tagged = _fitted(_tagged(expression), text[: place.start], text[place.end :])
        pieces.setdefault(place.turn, []).extend((before, tagged))
        ends[place.turn] = place.end
    conversations = [dict(turn) for turn in entry["conversations"]]
    for turn, parts in pieces.items():
        conversations[turn]["value"] = "".join(parts) + task.turns[turn].text[ends[turn] :]
    annotation = [entry["annotation"][place.object] for place in task.placeholders]
    return {**entry, "conversations": conversations, "annotation": annotation}


def _tagged(expression: Expression) -> str:
    start, end = noun_place(expression)
    text = expression.text
    return f"{text[:start]}<ins>{text[start:end]}</ins>{text[end:]}"


def _fitted(tagged: str, before: str, after: str) -> str:
    article = re.match(r"(?:the|an?)\s+", tagged, re.IGNORECASE)
    last = re.search(r"([^\W\d_]+)\s+$", before)
    if article and last and last.group(1).lower() in _DETERMINERS:
        tagged, article = tagged[article.end() :], None
    begins = not before.strip() or before.rstrip()[-1] in ".!?:>" or before.endswith("\n")
    if begins:
        tagged = re.sub(r"^(<ins>)?(\w)", lambda match: (match.group(1) or "") + match.group(2).upper(), tagged)
    elif article:
        tagged = tagged[0].lower() + tagged[1:]
    joined_before = before[-1:].isalnum() or before[-1:] in ",;"
    return " " * joined_before + tagged + " " * after[:1].isalnum()
