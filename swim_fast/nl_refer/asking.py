"""Prompts about a record for a language model, and the checked reading of its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile
from swim_fast.llm.journal import answer_key
from swim_fast.llm.json_answer import final_text, find_values, walk
from swim_fast.llm.settle import Request
from swim_fast.nl_refer.english.expressions import Expression
from swim_fast.nl_refer.placeholders import Task, check_rest, find_task
from swim_fast.nl_refer.validation import RejectedError, check_expressions

_SYSTEM = """\
You prepare training data for a video model. You are given a conversation about a video in which placeholders \
{{1}}, {{2}} … stand for objects that were marked in the video. For every placeholder write a short referring \
expression in plain English that can stand in its place.

- Take the expression from what the answers say about the object. Never invent an attribute.
- It must be minimal, yet tell the object from others: the noun with the attributes that matter (colour, clothing, \
kind, place), for example "the brown dog with a red collar". At most {max_words} words; no full sentence.
- Do not give away what the question asks for: no actions or changes if the question asks what happens.
- "noun" is the single most representative noun of the expression: one word, exactly as it stands in the expression \
("dog"; for "a pair of shoes": "shoes").
- Placeholders of one object get the same noun. Different objects must get different expressions.
- Read the sentence with the expression in it: it must be grammatical.

Answer with JSON and nothing else:
{{"expressions": [{{"placeholder": 1, "expression": "the brown dog with a red collar", "noun": "dog"}}]}}
If the conversation nowhere says what an object is, answer {{"expressions": null, "reason": "…"}}."""

_SPEAKERS = {"user": "Question", "assistant": "Answer", "system": "Instruction"}
_TAGS = re.compile(r"</?ins>")


class UnnamedError(RejectedError):
    """The model says that the conversation does not name the object: asking again would not help."""

    final = True


def make_request(task: Task, entry: dict, model: str, max_words: int) -> Request[list[Expression]]:
    """Return the request for the expressions of a record.

    Args:
        task: placeholders of the record.
        entry: the record as read from JSON; any change of it is another request.
        model: name of the model at the endpoint.
        max_words: most words of an expression.
    """
    chat = messages(task, max_words)

    def read(answer: str) -> list[Expression]:
        expressions = read_answer(answer, task)
        check_expressions(task, expressions, max_words)
        return expressions

    key = answer_key(task.index, entry, model, chat)
    return Request(task.index, key, chat, read, tokens_out=12 + 30 * len(task.placeholders))


def find_requests(
    records: RecordFile, count: int, binding: str, model: str, max_words: int
) -> Iterator[Request[list[Expression]] | None]:
    """Yield the request for each of the first `count` records; None where there is nothing to ask about.

    Args:
        binding: see `find_task`.
        model, max_words: as for `make_request`.
    """
    for index in range(count):
        try:
            entry = records.entry(index)
            task = find_task(entry, index, binding)
            if task is not None:
                check_rest(records, entry, task)
        except DataError:
            task = None  # reported when the output is written
        yield None if task is None else make_request(task, entry, model, max_words)


def messages(task: Task, max_words: int) -> list[dict[str, str]]:
    """Return the chat that asks for the expressions of a record."""
    lines, number = [], 0
    for i, turn in enumerate(task.turns):
        text, last = "", 0
        for placeholder in task.placeholders:
            if placeholder.turn == i:
                number += 1
                text += f"{turn.text[last : placeholder.start]}{{{number}}}"
                last = placeholder.end
        lines.append(f"{_SPEAKERS[turn.role]}: {(text + turn.text[last:]).replace('<video>', '').strip()}")
    lines += _shared_objects(task)
    system = {"role": "system", "content": _SYSTEM.format(max_words=max_words)}
    return [system, {"role": "user", "content": "\n".join(lines)}]


def _shared_objects(task: Task) -> Iterator[str]:
    numbers_of: dict[int, list[int]] = {}
    for number, placeholder in enumerate(task.placeholders, 1):
        numbers_of.setdefault(placeholder.object, []).append(number)
    for numbers in numbers_of.values():
        if len(numbers) > 1:
            yield f"({' and '.join(f'{{{n}}}' for n in numbers)} are the same object.)"


def read_answer(answer: str, task: Task) -> list[Expression]:
    """Return the expressions of a model's answer, in the order of the placeholders; not yet validated.

    Code fences, text before and after, Python in place of JSON, a bare list, and `<ins>` tags around the noun are
    understood.

    Raises:
        UnnamedError: the model says that there is no name to be found.
        RejectedError: no JSON of the expected form; placeholder numbers that are not 1, 2 … each once.
    """
    found = next(_candidates(answer), None)
    if found is None:
        raise RejectedError('there is no JSON object with "expressions" in the answer')
    items = found.get("expressions") if isinstance(found, dict) else found
    if items is None:
        reason = found.get("reason")
        raise UnnamedError(
            f"the answers do not name the object: {reason if isinstance(reason, str) else 'no reason given'}"
        )
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RejectedError('"expressions" is not a list of objects with "placeholder", "expression" and "noun"')
    for item in items:
        if not all(isinstance(item.get(key), str) for key in ("expression", "noun")):
            raise RejectedError('an entry lacks "expression" or "noun"')
    expressions = [_expression(item) for item in items]
    numbers = [item.get("placeholder") for item in items]
    if all(number is None for number in numbers):
        return expressions
    wanted = list(range(1, len(task.placeholders) + 1))
    if any(type(number) is not int for number in numbers) or sorted(numbers) != wanted:
        raise RejectedError(f'the "placeholder" numbers are {numbers}; each of {wanted} is wanted once')
    return [expression for _, expression in sorted(zip(numbers, expressions, strict=True), key=lambda pair: pair[0])]


def _expression(item: dict) -> Expression:
    text = " ".join(_TAGS.sub("", item["expression"]).split()).strip("\"'“” ").rstrip(".,;")
    return Expression(text, _TAGS.sub("", item["noun"]).strip("\"'“” .,"))


def _candidates(answer: str) -> Iterator[dict | list]:
    for value in (part for whole in find_values(final_text(answer)) for part in walk(whole)):
        if isinstance(value, dict) and "expressions" in value:
            yield value
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield value
