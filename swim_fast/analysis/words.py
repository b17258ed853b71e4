"""The words of the referring expression around each tagged noun, and their classes.

Tags and phrases are those of `swim_fast.nl_refer.english`. An expression is the noun phrase up to the tagged noun, and
the one modifier behind it ("with a red collar", "on the left", "wearing a hat"). Words of another tag's phrase do not
belong to it, so that no word counts twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from swim_fast.data.sample.conversation import PLACEHOLDER
from swim_fast.data.source.records import Record, Turn
from swim_fast.data.source.tags import strip_tags
from swim_fast.nl_refer.english.phrases import (
    NOUNS,
    POSITION,
    NounPhrase,
    Token,
    find_modifier_end,
    find_noun_phrase,
    possible_tags,
    tag_sentence,
)

CLASSES = ("noun", "attribute", "other noun", "function word")

_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_ATTRIBUTES = ("AJ0", "AJC", "AJS", "ORD", "CRD", "VVN", "VVG", "VVD")
_DETERMINERS = ("AT0", "DT0", "DPS", "CRD", "DTQ")
_UNKNOWN = ("UNC", "UNKNOWN", "!!!")
_PLACES = POSITION | frozenset(("left", "right"))
# HanTa takes words of other languages for rare English ones: a sentence without any of these is left alone.
_ENGLISH = frozenset("a an the this that these those his her its their what which who is are does with of and".split())
_LONGEST = 12  # words of a phrase before its noun


@dataclass(frozen=True)
class Word:
    """A word of an expression: characters [start, end) of its turn's text without tags, its class, its noun's tag."""

    start: int
    end: int
    kind: str
    tag: int


def find_words(text: str, nouns: Sequence[tuple[int, int]]) -> tuple[list[Word], list[int]]:
    """Find the words of the expressions of a turn.

    Args:
        text: of the turn, without tags.
        nouns: span of each tagged noun, ascending.

    Returns:
        The words in the order of the text, `tag` being an index of `nouns`; and the nouns that are not analysed: the
        tagger knows them for no English noun, or does not know a word of the expression.

    Raises:
        MissingLibraryError: HanTa is not installed.
    """
    words: list[Word] = []
    left_out: list[int] = []
    text = PLACEHOLDER.sub(lambda found: "\n" * len(found.group()), text)
    for sentence in _SENTENCE.finditer(text):
        first, last = sentence.span()
        here = {tag: (a - first, b - first) for tag, (a, b) in enumerate(nouns) if first <= a < last}
        if here:
            found, unclear = _words_of_sentence(sentence.group(), here)
            words += [replace(word, start=first + word.start, end=first + word.end) for word in found]
            left_out += unclear
    seen = {word.tag for word in words if word.kind == "noun"}.union(left_out)
    left_out += [tag for tag in range(len(nouns)) if tag not in seen]  # a noun that is no word, such as "..."
    return sorted(words, key=lambda word: word.start), sorted(left_out)


def _words_of_sentence(sentence: str, nouns: dict[int, tuple[int, int]]) -> tuple[list[Word], list[int]]:
    tokens = tag_sentence(sentence)
    phrases = {tag: _find_phrase(tokens, span) for tag, span in nouns.items()}
    tagged = {i for i, token in enumerate(tokens) if any(a < token.end and token.start < b for a, b in nouns.values())}
    own = {i for phrase in phrases.values() if phrase for i in range(phrase.start, phrase.end)} | tagged
    words: list[Word] = []
    left_out = []
    for tag, phrase in phrases.items():
        if phrase is None:
            left_out.append(tag)
            continue
        end = find_modifier_end(tokens, phrase)
        last = tokens[end - 1].word
        if end > phrase.end and (last == "doing" or (last.endswith("ing") and tokens[end - 2].tag in NOUNS)):
            end -= 1  # the man in black *doing*: what it does, which the tagger took for a compound
        end = next((i for i in range(phrase.end, end) if i in own), end)
        before = [i for i in range(phrase.start, phrase.head) if i not in tagged]
        if any(tokens[i].tag in _UNKNOWN for i in (*before, *range(phrase.end, end))):
            left_out.append(tag)
            continue
        words.append(Word(*nouns[tag], "noun", tag))
        for i in (*before, *range(phrase.end, end)):
            if tokens[i].text[0].isalnum():
                words.append(Word(tokens[i].start, tokens[i].end, _classify(tokens, i, i < phrase.head), tag))
    return words, left_out


def _find_phrase(tokens: list[Token], span: tuple[int, int]) -> NounPhrase | None:
    """Return the noun phrase up to the tagged noun, which is its head; None if that is no clear English noun."""
    inside = [i for i, token in enumerate(tokens) if span[0] < token.end and token.start < span[1]]
    foreign = any(letter.isalpha() and not letter.isascii() for token in tokens for letter in token.text)
    if not inside or tokens[inside[-1]].tag not in NOUNS or foreign or not any(t.word in _ENGLISH for t in tokens):
        return None
    head = inside[-1]
    for start in range(max(0, head - _LONGEST), inside[0] + 1):
        phrase = find_noun_phrase(tokens, start)
        if phrase is not None and phrase.start <= head < phrase.end:
            bare_name = tokens[head].tag == "NP0" and tokens[start].tag not in _DETERMINERS
            unclear = bare_name or (start > 0 and tokens[start - 1].tag in _UNKNOWN)
            return None if unclear else NounPhrase(start, head, head + 1)  # words unknown to the tagger become names
    return None


def _classify(tokens: list[Token], i: int, before_noun: bool) -> str:
    token = tokens[i]
    if token.tag in _ATTRIBUTES or token.word in _PLACES:
        return "attribute"
    if token.tag not in NOUNS:
        return "function word"
    after = tokens[i + 1].tag if i + 1 < len(tokens) else ""
    if before_noun and after != "POS":  # a *fire* truck; the *dog*'s tail is of another thing
        return "attribute"
    bare = tokens[i - 1].tag not in (*_DETERMINERS, *_ATTRIBUTES, *NOUNS)
    return "attribute" if bare and "AJ0" in possible_tags(token.word) else "other noun"  # in *black*


def tag_words(record: Record) -> tuple[Record, list[str], int]:
    """Tag every word of a record's expressions, with the masks of the noun.

    Returns:
        The record with a tag around each word, nouns that are not analysed left without; the class of each tag, in
        order; and the number of nouns that are not analysed.

    Raises:
        DataError: bad tags.
        MissingLibraryError: HanTa is not installed.
    """
    turns: list[Turn] = []
    objects = []
    classes: list[str] = []
    nouns_before = skipped = 0
    for turn in record.turns:
        text, nouns = strip_tags(turn.text)
        words, left_out = find_words(text, nouns) if nouns else ([], [])
        skipped += len(left_out)
        pieces, last = [], 0
        for word in words:
            pieces += [text[last : word.start], "<ins>", text[word.start : word.end], "</ins>"]
            last = word.end
        turns.append(replace(turn, text="".join([*pieces, text[last:]])))
        objects += [record.objects[nouns_before + word.tag] for word in words]
        classes += [word.kind for word in words]
        nouns_before += len(nouns)
    return replace(record, turns=tuple(turns), objects=tuple(objects)), classes, skipped
