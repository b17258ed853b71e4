"""Errors that a user can mend: the command line prints their message as one line, without a traceback."""

import re
from collections.abc import Callable, Sequence
from typing import Any


class UserError(Exception):
    """Base of every error whose message names what is wrong, where, and the remedy."""


class OptionError(UserError, ValueError):
    """An option that cannot be used; the message names the option, its value and what would be accepted."""


class MissingLibraryError(UserError, ImportError):
    """A library that a job needs and that is not installed; the message says how to install it."""


_TYPES = {"int": "int", "float": "a number", "finite": "a finite number", "bool": "true or false", "string": "text"}
_LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def explain(error: dict[str, Any], spell: Callable[[Sequence[int | str]], str]) -> str:
    """Say in one sentence what is wrong with an option, its value and what would be accepted.

    Args:
        error: one of pydantic's `ValidationError.errors()`.
        spell: writes a path of keys as the user knows it, such as `data.train[0].path` or `--max-frames`.
    """
    kind, path, value, context = error["type"], error["loc"], error["input"], error.get("ctx", {})
    if kind == "mistake":  # one of `Options.mistake`: other options are named in braces
        text = re.sub(r"\{(\w+)\}", lambda match: spell((*path, match[1])), context["text"])
        return f"{spell((*path, context['key']))} {text}"
    name = spell(path)
    if kind == "missing":
        return f"missing {name}"
    if kind == "literal_error":
        accepted = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"{name} is {value!r}; choose one of: {accepted}"
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        words = "positive" if (limit, context[limit]) == ("gt", 0) else f"{words} {context[limit]:g}"
        return f"{name} is {value!r}; it must be {words}"
    if kind == "too_short":
        return f"{name} is empty: name at least one, or leave it out"
    if kind in ("model_type", "dict_type"):
        return f"{name} must be a mapping of keys, not {type(value).__name__}"
    if expected := _TYPES.get(kind.split("_")[0]):
        return f"{name} is {value!r}; expected {expected}"
    return f"{name} is {value!r}; {error['msg'][0].lower()}{error['msg'][1:]}"
