"""What a language model is asked, and what is read out of its answer; nothing in an answer is taken on trust."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from swim_fast.nl_refer.placeholders import Expression, Task
from swim_fast.nl_refer.validation import RejectedError

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


def messages(task: Task, max_words: int) -> list[dict[str, str]]:
    """The chat that asks for the expressions of a record.

    Args:
        task: the record.
        max_words: most words of an expression.
    """
    lines, number = [], 0
    for i, turn in enumerate(task.turns):
        text, last = "", 0
        for place in task.placeholders:
            if place.turn == i:
                number += 1
                text += f"{turn.text[last : place.start]}{{{number}}}"
                last = place.end
        lines.append(f"{_SPEAKERS[turn.role]}: {(text + turn.text[last:]).replace('<video>', '').strip()}")
    lines += _sharing(task)
    system = {"role": "system", "content": _SYSTEM.format(max_words=max_words)}
    return [system, {"role": "user", "content": "\n".join(lines)}]


def _sharing(task: Task) -> Iterator[str]:
    owners: dict[int, list[int]] = {}
    for number, place in enumerate(task.placeholders, 1):
        owners.setdefault(place.object, []).append(number)
    for numbers in owners.values():
        if len(numbers) > 1:
            yield f"({' and '.join(f'{{{n}}}' for n in numbers)} are the same object.)"


def objection(answer: str, reason: str) -> list[dict[str, str]]:
    """What is added to the chat when an answer was rejected."""
    return [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": f"That will not do: {reason}. Answer again with the whole JSON and nothing else."},
    ]


def read_answer(answer: str, task: Task) -> list[Expression]:
    """The expressions of a model's answer, in the order of the placeholders; not yet validated.

    Code fences, text before and after, a bare list, and ``<ins>`` tags around the noun are put up with.

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
    answer = answer.rpartition("</think>")[2]  # of models that think aloud
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[{\[]", answer):
        try:
            value, _ = decoder.raw_decode(answer, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and "expressions" in value:
            yield value
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield value


def estimate_tokens(chat: Sequence[dict[str, str]], placeholders: int) -> tuple[int, int]:
    """Tokens that a request may cost, in and out: four characters of English are about a token."""
    return sum(len(message["content"]) for message in chat) // 4 + 8 * len(chat), 12 + 30 * placeholders
