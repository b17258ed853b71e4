"""What an expression must be before it may stand in a question; held against models and rules alike."""

from __future__ import annotations

import re
from collections.abc import Sequence

from swim_fast.nl_refer.placeholders import Expression, Task, noun_place

MAX_WORDS = 15

_WORDS = re.compile(r"[^\W_]+(?:[-.'’&][^\W_]+)*")
_NO_NOUNS = frozenset(
    "a an the this that these those it its he she they him her them his their we you i who which what one some any all "
    "object objects region regions thing something subject item entity target video frame clip scene "
    "of in on at with and or to is are".split()
)


class RejectedError(ValueError):
    """Expressions that will not do; the message says why, in words that the one who wrote them can act on."""


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.lower() for word in _WORDS.findall(text)]


def check_expressions(task: Task, expressions: Sequence[Expression], max_words: int = MAX_WORDS) -> None:
    """Hold expressions against the record.

    Raises:
        RejectedError: not one expression per placeholder; an empty, overlong or marked-up one; a noun that is not
            exactly one word, not in its expression, a mere pronoun or "object", or of which the conversation knows
            nothing; an answer copied whole; one expression for different objects, or different nouns for one object.
    """
    if len(expressions) != len(task.placeholders):
        raise RejectedError(f"there are {len(task.placeholders)} placeholders but {len(expressions)} expressions")
    said = {form for turn in task.turns for word in words(turn.text) for form in _forms(word)}
    answers = [words(turn.text) for turn in task.turns if turn.role == "assistant"]
    for i, expression in enumerate(expressions, 1):
        try:
            _check(expression, said, answers, max_words)
        except RejectedError as error:
            raise RejectedError(f"expression {i}, {expression.text!r}: {error}") from None
    _check_objects(task, expressions)


def _check(expression: Expression, said: set[str], answers: list[list[str]], max_words: int) -> None:
    text, noun = expression.text, expression.noun
    if not words(text):
        raise RejectedError("it is empty")
    if text != text.strip() or re.search(r"[<>{}\[\]\n\t]|[.!?;:]$", text):
        raise RejectedError("it holds markup, a line break or a sentence's end; give the plain phrase")
    if len(words(text)) > max_words:
        raise RejectedError(f"it has {len(words(text))} words; {max_words} are allowed")
    if words(noun) != [noun.lower()]:
        raise RejectedError(f"the noun {noun!r} is not exactly one word")
    if noun.lower() in _NO_NOUNS:
        raise RejectedError(f"the noun {noun!r} does not say what the object is")
    if noun_place(expression) is None:
        raise RejectedError(f"the noun {noun!r} is not a word of it")
    if not _forms(noun.lower()) & said:
        raise RejectedError(f"the noun {noun!r} does not occur in the conversation; take it from the answer")
    core = words(text)
    core = core[1:] if core[0] in ("a", "an", "the") else core
    for answer in answers:
        if len(answer) > 5 and len(core) >= 0.8 * len(answer) and _contains(answer, core):
            raise RejectedError("it copies the answer; a short phrase is wanted that tells the object from others")


def _check_objects(task: Task, expressions: Sequence[Expression]) -> None:
    nouns: dict[int, str] = {}
    owner: dict[tuple[str, ...], int] = {}
    for place, expression in zip(task.placeholders, expressions, strict=True):
        noun = nouns.setdefault(place.object, expression.noun.lower())
        if noun != expression.noun.lower():
            raise RejectedError(f"one object is named by two nouns, {noun!r} and {expression.noun!r}; choose one")
        if owner.setdefault(tuple(words(expression.text)), place.object) != place.object:
            raise RejectedError(f"two different objects are both called {expression.text!r}; tell them apart")


def _forms(word: str) -> set[str]:
    """A word and what may be its singular, coarsely: enough to see whether a noun was made up."""
    return {word, word.removesuffix("'s").removesuffix("’s"), word.removesuffix("s"), word.removesuffix("es")}


def _contains(answer: list[str], phrase: list[str]) -> bool:
    return any(answer[i : i + len(phrase)] == phrase for i in range(len(answer) - len(phrase) + 1))
