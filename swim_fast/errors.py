"""Errors that a user can mend: the command line prints their message as one line, without a traceback."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

SEE_DOCTOR = " (swim-fast doctor shows what works here)"


class UserError(Exception):
    """Base of every error whose message names what is wrong, where, and the remedy."""

    exit_status = 2  # of the command

    def __init__(self, *args: Any):
        name = type(self).__name__
        if args and str(args[0]).startswith(f"Caught {name} in "):  # a DataLoader's worker: its traceback helps nobody
            args = (args[0].rpartition(f"{name}: ")[2].strip().removesuffix(SEE_DOCTOR), *args[1:])
        super().__init__(*args)


class OptionError(UserError, ValueError):
    """An option that cannot be used; the message names the option, its value and what would be accepted."""


class ProcessorError(UserError, ValueError):
    """A model's processor that samples cannot be made with."""


class MissingLibraryError(UserError, ImportError):
    """A library that a job needs and that is not installed; the message says how to install it."""

    def __str__(self) -> str:
        return f"{super().__str__()}{SEE_DOCTOR}"


def printable(text: str) -> str:
    """Return a text with its control characters, line breaks and halves of surrogate pairs written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_OTHER = re.compile(r"\{([\w.]+)\}")  # option that the text of a mistake names
_TYPES = {"int": "int", "float": "a number", "finite": "a finite number", "bool": "true or false", "string": "text"}
_LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def name_count(number: int, noun: str) -> str:
    """Return a number and the singular or regular plural of a noun: "1 record", "2,000 records"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def nearest(key: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"


def error_path(error: dict[str, Any]) -> tuple[int | str, ...]:
    """Return the keys that lead to the option which one of pydantic's `ValidationError.errors()` is about."""
    if error["type"] == "mistake":  # one of `swim_fast.options.mistake`
        return *error["loc"], *filter(None, error["ctx"]["key"].split("."))
    return tuple(key for key in error["loc"] if key != "[key]")


def named_paths(error: dict[str, Any]) -> list[tuple[int | str, ...]]:
    """Return `error_path` and the paths of the other options that a `swim_fast.options.mistake` names."""
    others = _OTHER.findall(error["ctx"]["text"]) if error["type"] == "mistake" else ()
    return [error_path(error), *((*error["loc"], *other.split(".")) for other in others)]


def explain(error: dict[str, Any], spell: Callable[[Sequence[int | str]], str]) -> str:
    """Say in one sentence what is wrong with an option, its value and what would be accepted.

    Args:
        error: one of pydantic's `ValidationError.errors()`.
        spell: writes a path of keys as the user knows it, such as `data.train[0].path` or `--max-frames`.
    """
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    name = spell(error_path(error))
    if kind == "mistake":
        return f"{name} " + _OTHER.sub(lambda match: spell((*error["loc"], *match[1].split("."))), context["text"])
    if kind == "missing":
        return f"missing {name}"
    if kind == "literal_error":
        accepted = context["expected"].replace(" or ", ", ").replace("'", "")
        if error["loc"][-1] == "[key]":
            return f"{name} is unknown; {nearest(value, accepted.split(', '))}"
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
