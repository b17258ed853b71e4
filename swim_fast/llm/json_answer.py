"""JSON in a model's answer: in code fences, between prose, behind thoughts, or written as Python."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

_OPENING = re.compile(r"[{\[]")


def final_text(answer: str) -> str:
    """Return an answer without the thoughts that a reasoning model writes before it."""
    return answer.rpartition("</think>")[2]


def find_values(text: str) -> Iterator[dict | list]:
    """Yield the outermost dicts and lists that a text holds, as JSON or as Python literals, in order."""
    decoder, start = json.JSONDecoder(), 0
    while bracket := _OPENING.search(text, start):
        try:
            value, start = decoder.raw_decode(text, bracket.start())
        except (ValueError, RecursionError):
            value, start = _python_literal(text, bracket.start())
        if isinstance(value, dict | list):
            yield value


def walk(value: Any) -> Iterator[dict | list]:
    """Yield a dict or list and all dicts and lists in it, each before its parts."""
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from walk(part)


def _python_literal(text: str, start: int) -> tuple[Any, int]:
    """Return the shortest literal at `start` and its end; None and the next position if there is none."""
    closing = "}" if text[start] == "{" else "]"
    end = start
    while (end := text.find(closing, end) + 1) > 0:
        try:
            return ast.literal_eval(text[start:end]), end
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None, start + 1
