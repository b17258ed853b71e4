"""From categories and referring expressions to a tagged noun, and from that to a question and its answer."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.tags import strip_tags
from swim_fast.nl_refer.english.inflection import pluralize
from swim_fast.nl_refer.english.phrases import Token, tag_sentence
from swim_fast.nl_refer.english.referring import find_referred_phrase

# Questions and answers that are true of whatever has a mask, and that agree with one object as with several.
PHRASES = (
    ("Can you see {name} in this {medium}?", "Yes, I can see {name}."),
    ("Does this {medium} show {name}?", "Yes, it shows {name}."),
    ("Is it possible to see {name} here?", "Yes, {name} can be seen here."),
)
CLAUSES = (
    ("Can you see that {name}?", "Yes, I can see that {name}."),
    ("Does this {medium} show that {name}?", "Yes, it shows that {name}."),
)

_PREPOSITIONS = frozenset("of with in on at for to from by near behind under above beside".split())
_ARTICLES = frozenset("a an the".split())
_DETERMINERS = ("AT0", "DT0", "DPS", "CRD", "PNI", "NP0", "DTQ")
_FINITE = ("VBZ", "VBB", "VBD", "VHZ", "VHB", "VHD", "VDZ", "VDB", "VDD", "VM0", "VVZ")
_RELATIVE = ("PNQ", "DTQ", "CJT", "CJS", "AVQ")


@dataclass(frozen=True)
class Name:
    """Words for an object, one noun of them tagged: `the brown <ins>dog</ins>`.

    `form` says how they fit a question: a "phrase", a "clause" ("the dog runs"), or a "question" of their own.
    """

    tagged: str
    form: str = "phrase"

    @property
    def plain(self) -> str:
        """The words without tags."""
        return strip_tags(self.tagged)[0]


def is_category(text: str) -> bool:
    """Tell if a text is the bare name of a category ("dining table") rather than a referring expression."""
    words = text.lower().split()
    acts = len(words) > 1 and words[-1].endswith(("ing", "ed"))  # "dog running"
    return "<ins>" not in text and len(words) <= 3 and not acts and not {*words} & (_ARTICLES | _PREPOSITIONS)


def name_category(text: str, several: bool = False) -> Name:
    """Return "the <ins>dog</ins>" for a category; its plural where `several` objects share it.

    Raises:
        DataError: no words in the text.
    """
    words = re.sub(r"\(.*?\)|[_/]+", " ", text).split()
    words = [word.lower() if word.istitle() else word for word in words]
    if words and words[0].lower() in _ARTICLES:
        words = words[1:]
    if not words or not re.search(r"[^\W\d]", text) or re.search(r"[<>]", text):
        raise DataError(f"{text!r} is no name of an object; give it one with --names")
    head = next((i for i, word in enumerate(words) if i and word in _PREPOSITIONS), len(words)) - 1
    noun = pluralize(words[head]) if several else words[head]
    return Name(" ".join(["the", *words[:head], f"<ins>{noun}</ins>", *words[head + 1 :]]))


def name_expression(text: str) -> Name:
    """Tag the noun that heads a referring expression; a tag that is there stays.

    Raises:
        DataError: the expression does not clearly name one object, as far as the rules can tell; bad tags.
        MissingLibraryError: HanTa is missing.
    """
    text = " ".join(text.split()).rstrip(".! ")
    plain, tags = strip_tags(text)
    if len(tags) == 1:
        return Name(text, "question" if text.endswith("?") else "phrase")
    tokens = tag_sentence(plain)
    phrase = find_referred_phrase(tokens) if not tags else None
    if phrase is None:
        reason = "has several tags" if tags else "does not clearly name one object, as far as the rules can tell"
        raise DataError(f"{plain!r} {reason}; mark its noun as <ins>noun</ins>")
    head = tokens[phrase.head]
    tagged = f"{plain[: head.start]}<ins>{head.text}</ins>{plain[head.end :]}"
    if plain.endswith("?"):
        return Name(tagged[0].upper() + tagged[1:], "question")
    first = tokens[0]
    if first.tag != "NP0" and first.text.istitle():  # it stands in the middle of a sentence now
        tagged = re.sub(r"^(<ins>)?(\w)", lambda match: (match[1] or "") + match[2].lower(), tagged)
    if phrase.start == 0 and first.tag not in _DETERMINERS:
        tagged = "the " + tagged
    return Name(tagged, "clause" if _is_clause(tokens[phrase.end :]) else "phrase")


def _is_clause(rest: Sequence[Token]) -> bool:
    """Tell if what follows the head is what it does ("… is running"), not what tells it from others ("that is …")."""
    found = next((token.tag for token in rest if token.tag in (*_FINITE, *_RELATIVE)), None)
    return found in _FINITE


def ask(
    name: Name, medium: str, key: str, questions: Sequence[str] = (), answers: Sequence[str] = ()
) -> tuple[str, str]:
    """Return a question with the tagged name and an answer to it.

    Args:
        name: whom it is about.
        medium: "video" or "image".
        key: name of the record; chooses among the templates, always alike.
        questions, answers: templates in place of the built-in ones, with `{name}` and `{medium}`; one answer for all
            questions, or one for each.

    Raises:
        DataError: a question of the source's own, and no answer to it.
    """
    templates = CLAUSES if name.form == "clause" else PHRASES
    if name.form == "question":
        if not answers:
            raise DataError("is a question, and the source has no answer to it; give one for all with --answer")
        templates = [(name.tagged, answer) for answer in answers]
    elif questions:
        templates = list(zip(questions, answers * len(questions) if len(answers) == 1 else answers, strict=True))
    question, answer = templates[zlib.crc32(key.encode(errors="replace")) % len(templates)]
    return _fill(question, name.tagged, medium), _fill(answer, name.plain, medium)


def _fill(template: str, name: str, medium: str) -> str:
    text = template.replace("{medium}", medium).replace("{name}", name)
    return re.sub(r"^(<ins>)?(\w)", lambda match: (match[1] or "") + match[2].upper(), text)
