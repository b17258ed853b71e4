"""`<ins>noun</ins>` tags: stripped from the text, kept as character spans, found again among the tokens."""

from __future__ import annotations

import re

import numpy as np
from torch import Tensor

from swim_fast.data.source.errors import DataError

_TAG = re.compile(r"</?ins>")
OBJECT_PLACEHOLDER = re.compile(r"<object\d*>\s*<region>|<region>|<object\d+>")  # raw VideoRefer's, for a tagged noun


def strip_tags(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove the `<ins>…</ins>` tags of a text and return the spans of the tagged nouns in what is left.

    Args:
        text: text of one turn.

    Returns:
        The text without its tags, otherwise unchanged, and one half-open span `(start, end)` of characters of that
        text per tag, in order. White space at either end of the tagged part does not belong to the noun.

    Raises:
        DataError: a tag inside a tag, one that is not closed or not opened, and one with nothing in it.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0  # of the pieces so far
    opened: int | None = None  # where the current tag's content starts in the clean text
    last = 0
    for tag in _TAG.finditer(text):
        pieces.append(text[last : tag.start()])
        length += tag.start() - last
        last = tag.end()
        if tag.group() == "<ins>":
            if opened is not None:
                raise DataError(f"a <ins> tag inside another one, at {_excerpt(text, tag)}; close the first one")
            opened = length
        else:
            if opened is None:
                raise DataError(f"</ins> without <ins> before it, at {_excerpt(text, tag)}; add the missing tag")
            content = pieces[-1]  # tags do not nest, so the noun is one piece
            if not content.strip():
                raise DataError(f"an <ins> tag with nothing in it, at {_excerpt(text, tag)}; name the object in it")
            start = opened + len(content) - len(content.lstrip())
            spans.append((start, start + len(content.strip())))
            opened = None
    if opened is not None:
        raise DataError(f"<ins> is never closed in {text[-60:]!r}; add </ins> after the noun")
    pieces.append(text[last:])
    return "".join(pieces), spans


def _excerpt(text: str, tag: re.Match[str]) -> str:
    return repr(text[max(0, tag.start() - 25) : tag.end() + 25])


class TokenRanges:
    """Tokens by the characters that they hold; each lookup is a binary search.

    Args:
        offsets: [L, 2] integers, the half-open character range of each token, ascending, as a fast tokenizer returns
            it. Tokens without characters have an empty range and are never part of a noun.
    """

    def __init__(self, offsets: Tensor):
        ranges = offsets.numpy()
        self._tokens = np.flatnonzero(ranges[:, 0] < ranges[:, 1])
        self._starts, self._ends = ranges[self._tokens].T.copy()

    def tokens_of(self, span: tuple[int, int]) -> list[int]:
        """Return the positions of the tokens that hold at least one character of a span, in order.

        A token may hold more than the noun (the space before it, a bracket, its plural's apostrophe) or a part of one
        character (byte-level tokens of an emoji share its offsets); every one that overlaps the span counts.
        """
        start, end = span
        first, last = np.searchsorted(self._ends, start, "right"), np.searchsorted(self._starts, end, "left")
        return self._tokens[first:last].tolist()
