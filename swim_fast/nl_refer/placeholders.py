"""VideoRefer's placeholders: found in a record, bound to their masks, and replaced by tagged expressions.

A placeholder is `<object1><region>`, `<object1>` or `<region>` in a human turn. Each becomes one `<ins>` tag. As the
i-th tag owns `annotation[i]`, the annotations are assigned anew: an object that is named twice gets its masks twice,
one that no placeholder names is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile, Turn, read_turns
from swim_fast.data.source.tags import OBJECT_PLACEHOLDER
from swim_fast.nl_refer.english.expressions import Expression
from swim_fast.nl_refer.english.rules import Mention

_DETERMINERS = frozenset("a an the this that these those his her its their our your my".split())


@dataclass(frozen=True)
class Placeholder:
    """Characters [start, end) of a turn that stand for the object of `annotation[object]`."""

    turn: int
    start: int
    end: int
    object: int


@dataclass(frozen=True)
class Task:
    """A raw record whose placeholders want expressions.

    Attributes:
        index: index of the record in its file.
        turns: the conversation as written.
        placeholders: in reading order; one expression is due for each.
        unnamed: number of objects with masks but no placeholder.
        contested: the numbers of the placeholders bind them to other masks than their order does.
    """

    index: int
    turns: tuple[Turn, ...]
    placeholders: tuple[Placeholder, ...]
    unnamed: int
    contested: bool

    def mentions(self) -> list[Mention]:
        """Return the placeholders with the questions that they stand in and the answers to these."""
        return [
            Mention(p.turn, self.turns[p.turn].text, p.start, p.end, p.object, self._answer_to(p.turn))
            for p in self.placeholders
        ]

    def _answer_to(self, turn: int) -> str:
        following = self.turns[turn + 1 : turn + 2]
        return following[0].text if following and following[0].role == "assistant" else ""


def find_task(entry: dict, index: int, binding: str = "number") -> Task | None:
    """Find the placeholders of a raw record; None if its conversation has none.

    Args:
        entry: the record as read from JSON.
        index: index of the record in its file.
        binding: "number": `<objectN>` is the N-th annotation (counted from 0 if the record has an `<object0>`, from 1
            otherwise; where the record has as many annotations as different numbers, they are simply in the same
            order), and a bare `<region>` takes the next annotation that no number claims. "order": as VideoRefer's own
            model reads them: the object that comes up first has the first annotation, whatever its number.

    Raises:
        DataError: no proper conversation; a placeholder in an answer or system turn; `<ins>` tags beside placeholders;
            placeholders without annotation.
    """
    turns = read_turns(entry)
    found = [(i, match) for i, turn in enumerate(turns) for match in OBJECT_PLACEHOLDER.finditer(turn.text)]
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
    placeholders = (Placeholder(i, *match.span(), k) for (i, match), k in zip(found, objects, strict=True))
    return Task(index, turns, tuple(placeholders), count - len(set(objects)), objects != others)


def check_rest(records: RecordFile, entry: dict, task: Task) -> None:
    """Check the rest of a raw record before anything is spent on its placeholders.

    Raises:
        DataError: what would still be wrong with the record once its placeholders are replaced.
    """
    stand_ins = [Expression("object", "object")] * len(task.placeholders)
    records.parse(replace_placeholders(entry, task, stand_ins), task.index)


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


def replace_placeholders(entry: dict, task: Task, expressions: Sequence[Expression]) -> dict[str, Any]:
    """Return the record with tagged expressions for its placeholders; nothing else of the conversation changes.

    An article is left out where the question has one already, the first letter is capital where a sentence begins, and
    a space is added where a word would touch the question's.

    Args:
        entry, task: the raw record and what `find_task` found in it.
        expressions: one per placeholder, each with its noun in it.
    """
    pieces: dict[int, list[str]] = {}
    ends: dict[int, int] = {}
    for placeholder, expression in zip(task.placeholders, expressions, strict=True):
        turn, text = placeholder.turn, task.turns[placeholder.turn].text
        before = text[ends.get(turn, 0) : placeholder.start]
        tagged = _fit(_add_tags(expression), text[: placeholder.start], text[placeholder.end :])
        pieces.setdefault(turn, []).extend((before, tagged))
        ends[turn] = placeholder.end
    conversations = [dict(turn) for turn in entry["conversations"]]
    for turn, parts in pieces.items():
        conversations[turn]["value"] = "".join(parts) + task.turns[turn].text[ends[turn] :]
    annotation = [entry["annotation"][placeholder.object] for placeholder in task.placeholders]
    return {**entry, "conversations": conversations, "annotation": annotation}


def _add_tags(expression: Expression) -> str:
    start, end = expression.noun_span()
    text = expression.text
    return f"{text[:start]}<ins>{text[start:end]}</ins>{text[end:]}"


def _fit(tagged: str, before: str, after: str) -> str:
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
