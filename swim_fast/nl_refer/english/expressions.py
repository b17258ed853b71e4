"""Referring expressions: a phrase, and the one word of it that names the object."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORDS = re.compile(r"[^\W_]+(?:[-.'’&][^\W_]+)*")


@dataclass(frozen=True)
class Expression:
    """A referring expression without tags, and the one word of it that is to be tagged."""

    text: str
    noun: str

    def noun_span(self) -> tuple[int, int] | None:
        """Return the half-open range of characters that is the noun as a word of its own; None if there is none."""
        match = re.search(rf"(?<![\w-]){re.escape(self.noun)}(?![\w-])", self.text, re.IGNORECASE)
        return match.span() if match else None


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return [word.lower() for word in _WORDS.findall(text)]
