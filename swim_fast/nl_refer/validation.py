"""Check expressions before they enter a question, whether a model or a rule made them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from swim_fast.llm.settle import AnswerError
from swim_fast.nl_refer.english.expressions import Expression, split_words
from swim_fast.nl_refer.placeholders import Task

MAX_WORDS = 15

_NO_NOUNS = frozenset(
    "a an the this that these those it its he she they him her them his their we you i who which what one some any all "
    "object objects region regions thing something subject item entity target video frame clip scene "
    "of in on at with and or to is are".split()
)


class RejectedError(AnswerError):
    """Expressions that will not do; the message says why, in words that their author can act on."""


def check_expressions(task: Task, expressions: Sequence[Expression], max_words: int = MAX_WORDS) -> None:
    """Hold expressions against the record.

    Raises:
        RejectedError: not one expression per placeholder; an empty, overlong or marked-up one; a noun that is not
            exactly one word, not in its expression, a mere pronoun or "object", or of which the conversation knows
            nothing; an answer copied whole; one expression for different objects, or different nouns for one object.
    """
    if len(expressions) != len(task.placeholders):
        raise RejectedError(f"there are {len(task.placeholders)} placeholders but {len(expressions)} expressions")
    said = {form for turn in task.turns for word in split_words(turn.text) for form in _forms(word)}
    answers = [split_words(turn.text) for turn in task.turns if turn.role == "assistant"]
    for i, expression in enumerate(expressions, 1):
        if objection := _find_objection(expression, said, answers, max_words):
            raise RejectedError(f"expression {i}, {expression.text!r}: {objection}")
    _check_objects(task, expressions)


def _find_objection(expression: Expression, said: set[str], answers: list[list[str]], max_words: int) -> str | None:
    text, noun, words = expression.text, expression.noun, split_words(expression.text)
    if not words:
        return "it is empty"
    if text != text.strip() or re.search(r"[<>{}\[\]\n\t]|[.!?;:]$", text):
        return "it holds markup, a line break or a sentence's end; give the plain phrase"
    if len(words) > max_words:
        return f"it has {len(words)} words; {max_words} are allowed"
    if split_words(noun) != [noun.lower()]:
        return f"the noun {noun!r} is not exactly one word"
    if noun.lower() in _NO_NOUNS:
        return f"the noun {noun!r} does not say what the object is"
    if expression.noun_span() is None:
        return f"the noun {noun!r} is not a word of it"
    if not _forms(noun.lower()) & said:
        return f"the noun {noun!r} does not occur in the conversation; take it from the answer"
    core = words[1:] if words[0] in ("a", "an", "the") else words
    for answer in answers:
        if len(answer) > 5 and len(core) >= 0.8 * len(answer) and _contains(answer, core):
            return "it copies the answer; a short phrase is wanted that tells the object from others"
    return None


def _check_objects(task: Task, expressions: Sequence[Expression]) -> None:
    nouns: dict[int, str] = {}
    owner: dict[tuple[str, ...], int] = {}
    for placeholder, expression in zip(task.placeholders, expressions, strict=True):
        noun = nouns.setdefault(placeholder.object, expression.noun.lower())
        if noun != expression.noun.lower():
            raise RejectedError(f"one object is named by two nouns, {noun!r} and {expression.noun!r}; choose one")
        if owner.setdefault(tuple(split_words(expression.text)), placeholder.object) != placeholder.object:
            raise RejectedError(f"two different objects are both called {expression.text!r}; tell them apart")


def _forms(word: str) -> set[str]:
    """Return a word and what may be its singular, coarsely: enough to see whether a noun was made up."""
    return {word, word.removesuffix("'s").removesuffix("’s"), word.removesuffix("s"), word.removesuffix("es")}


def _contains(answer: list[str], phrase: list[str]) -> bool:
    return any(answer[i : i + len(phrase)] == phrase for i in range(len(answer) - len(phrase) + 1))
