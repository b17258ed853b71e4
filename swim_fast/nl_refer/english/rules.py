"""Expressions without a language model: the noun phrase with which an answer's sentence names the object.

Only what is clear is taken; all else is rejected with the reason, since a noun bound to the wrong mask teaches the
wrong thing. An answer may name the object as the subject of its first sentence or in a sentence that presents it (see
`swim_fast.nl_refer.english.phrases`). If a question has several objects, each needs a sentence of its own, in order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from swim_fast.nl_refer.english.expressions import Expression, split_words
from swim_fast.nl_refer.english.phrases import Token, find_described_phrase, find_modifier_end, tag_sentence

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*;\s+|,\s+(?=while\b|whereas\b)|\n+")
_ASKS_FOR_DESCRIPTION = re.compile(
    r"\b(?:descri\w+|identif\w+|details?|caption\w*|summar\w+|explain\w*|introduc\w+|tell|name)\b", re.IGNORECASE
)
_ASKS_MORE = re.compile(r"\b(?:what|where|how|who|which|why|when)\b", re.IGNORECASE)
_ASKS_WHAT = re.compile(r"(?:^|[\s,])(?:what|who)(?:'s| is| are)$", re.IGNORECASE)
_ENDS = re.compile(r"\W*(?:(?:in|of|from) (?:the|this) \w+)?\W*$")
# "the man with <region>", "who is holding <region>": the answer's subject is somebody else
_ASIDE = frozenset(
    "with to on near beside by from in under behind at into next over above below inside around against between and or "
    "than like using toward towards".split()
)
_KEPT_DETERMINERS = frozenset("several many few all both each every most his her their its one".split())


class UnclearError(ValueError):
    """No answer clearly names an object; the message says why."""


@dataclass(frozen=True)
class Mention:
    """An object that a question points at without naming it.

    Attributes:
        turn: index of the question in its conversation.
        question: its text.
        start, end: characters [start, end) of the question that point at the object.
        object: index of the object; several mentions may share it.
        answer: what is answered to the question, "" if nothing is.
    """

    turn: int
    question: str
    start: int
    end: int
    object: int
    answer: str


def name_objects(mentions: Sequence[Mention]) -> list[Expression]:
    """Return one expression per mention, taken from the answers.

    Raises:
        UnclearError: no answer clearly names the object.
    """
    by_turn: dict[int, list[Mention]] = {}
    for mention in mentions:
        by_turn.setdefault(mention.turn, []).append(mention)
    named: dict[int, Expression] = {}
    problems: dict[int, UnclearError] = {}
    for of_turn in by_turn.values():
        objects = list(dict.fromkeys(mention.object for mention in of_turn))
        if all(k in named for k in objects):
            continue
        try:
            found = _name_in_answer(of_turn[0], len(objects))
        except UnclearError as error:
            problems = dict.fromkeys(objects, error) | problems
            continue
        named = dict(zip(objects, found, strict=True)) | named
    for mention in mentions:
        if mention.object not in named:
            raise problems[mention.object]
    return [named[mention.object] for mention in mentions]


def _name_in_answer(mention: Mention, count: int) -> list[Expression]:
    sentences = [sentence for sentence in _SENTENCE_END.split(mention.answer) if split_words(sentence)]
    if not sentences:
        raise UnclearError("there is no answer that could name the object")
    if count > 1:
        return _one_sentence_each(sentences, count)
    before = mention.question[: mention.start]
    last = split_words(before)[-1:]
    if last and (last[0] in _ASIDE or _is_action(before)):
        raise UnclearError("the question is not about the object itself, so the answer's subject may be another one")
    wants_name = _wants_name(before, mention.question[mention.end :])
    for i, sentence in enumerate(sentences):
        tokens = tag_sentence(sentence)
        if i == 0 and not wants_name and not any(token.tag.startswith("V") for token in tokens):
            raise UnclearError("the answer is no sentence; what it names may be something else than the object")
        expression = _expression(sentence, tokens, subjects=i == 0)
        if expression is not None:
            return [expression]
    raise UnclearError("no sentence of the answer clearly names the object")


def _wants_name(before: str, after: str) -> bool:
    """Tell if a bare phrase, such as "a red car", answers the question with the object itself."""
    if _ASKS_WHAT.search(before.rstrip()):
        return bool(_ENDS.match(after))
    return bool(_ASKS_FOR_DESCRIPTION.search(before)) and not _ASKS_MORE.search(before)


def _is_action(before: str) -> bool:
    """Tell if the question's last word is a verb that somebody does to the object ("who is holding")."""
    tokens = [token for token in tag_sentence(before) if split_words(token.text)]
    while tokens and tokens[-1].tag in ("AT0", "DT0"):
        tokens.pop()
    acts = bool(tokens) and tokens[-1].tag in ("VVG", "VVZ", "VVD", "VVB", "VVI", "VVN")
    return acts and not _ASKS_FOR_DESCRIPTION.search(tokens[-1].text)


def _one_sentence_each(sentences: Sequence[str], count: int) -> list[Expression]:
    named = [_expression(sentence, tag_sentence(sentence), subjects=True) for sentence in sentences]
    found = [expression for expression in named if expression is not None]
    if len(found) != count or len({tuple(split_words(expression.text)) for expression in found}) != count:
        raise UnclearError(
            f"the question is about {count} objects and the answer does not name each in a sentence of its own; a "
            "model can tell which is which, the rules cannot"
        )
    return found


def _expression(sentence: str, tokens: list[Token], *, subjects: bool) -> Expression | None:
    phrase = find_described_phrase(tokens, subjects=subjects)
    if phrase is None:
        return None
    end = find_modifier_end(tokens, phrase)
    text = sentence[tokens[phrase.start].start : tokens[end - 1].end]
    first, head = tokens[phrase.start], tokens[phrase.head]
    if first.word in ("a", "an", "the", "some", "this", "that", "these", "those", "another"):
        text = "the " + text[len(first.text) :].lstrip()
    elif (
        first.tag == "PNI"
        or first.word in _KEPT_DETERMINERS
        or any(token.tag == "PRF" for token in tokens[phrase.start : phrase.start + 2])
    ):
        text = text[0].lower() + text[1:]
    elif not _is_name(tokens, phrase.start):
        text = "the " + text[0].lower() + text[1:]
    return Expression(text, head.text)


def _is_name(tokens: list[Token], i: int) -> bool:
    """Tell if a phrase begins with a name, which takes no article and keeps its capital letter."""
    token, after = tokens[i], tokens[i + 1].tag if i + 1 < len(tokens) else ""
    return token.text[0].isupper() and (token.tag == "NP0" or (token.tag == "NN1" and after != "NN1"))
