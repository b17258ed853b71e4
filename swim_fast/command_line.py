"""Command lines made from options: a flag per field, with its type, choices, default and docstring.

argparse and sixty lines do it. tyro would, too, for one more dependency and a start several times as slow, and leaves
neither `key=value` words behind flags nor the errors to us.
"""

import argparse
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError

from swim_fast.errors import OptionError, explain
from swim_fast.options import Options, unwrap

Job = TypeVar("Job", bound=Options)
_METAVARS = {int: "N", float: "X"}


def add_options(parser: argparse.ArgumentParser, job: type[Options]) -> None:
    """Add the options of a job to a parser; what is not given on the command line stays unset."""
    groups: dict[str, Any] = {"": parser}
    for name in (*job.words, *(name for name in job.model_fields if name not in job.words)):
        required, keywords = job.model_fields[name].is_required(), _keywords(job, name)
        if name in job.words:
            one, several = (None, "+") if required else ("?", "*")
            parser.add_argument(name, nargs=several if keywords.pop("action", None) else one, **keywords)
            continue
        title = _group(job, name)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag(job, name), dest=name, required=required, **keywords)


def _keywords(job: type[Options], name: str) -> dict[str, Any]:
    """Return argparse's keywords for an option."""
    field = job.model_fields[name]
    text = " ".join(field.description.split()).replace("%", "%%").replace("`", "").removesuffix(".")
    keywords = {"help": text + _default_text(job, name), "default": argparse.SUPPRESS}
    kind = unwrap(field.annotation)
    if get_origin(kind) is Literal:
        return keywords | {"metavar": "{" + ",".join(get_args(kind)) + "}"}  # a wrong one is refused with the others
    if kind is bool:
        return keywords | {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    if get_origin(kind) is list:
        (item,) = get_args(kind)  # texts come one to a flag, which else would swallow the words behind it
        keywords |= {"action": "append"} if item is str else {"nargs": "+"}
        kind = item
    metavar = None if name in job.words else _METAVARS.get(kind, name.upper())
    return keywords | {"type": kind, "metavar": metavar}


def read_options(job: type[Job], args: argparse.Namespace) -> Job:
    """Return the options of a job that a command line gives.

    Raises:
        OptionError: naming each flag, its value and what would be accepted.
    """

    def spell(path: Sequence[int | str]) -> str:
        return flag(job, path[0]) + "".join(f" [{key}]" for key in path[1:])

    try:
        return job.model_validate({name: value for name, value in vars(args).items() if name in job.model_fields})
    except ValidationError as error:
        raise OptionError("; ".join(explain(mistake, spell) for mistake in error.errors())) from None


def flag(job: type[Options], name: str) -> str:
    """Spell an option as on the command line."""
    return name if name in job.words else "--" + name.replace("_", "-")


def _group(job: type[Options], name: str) -> str:
    """Return the title of the class that declares an option; "" for options of the job alone and single ones."""
    owner = next(cls for cls in reversed(job.__mro__) if name in cls.__dict__.get("__annotations__", {}))
    if owner.__module__ != Options.__module__ or len(owner.__dict__["__annotations__"]) == 1:
        return ""
    title = owner.__doc__.strip().partition("\n")[0].removesuffix(".")
    return title[0].lower() + title[1:]


def _default_text(job: type[Options], name: str) -> str:
    default, shown = job.model_fields[name].default, ""
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        shown = f"{default:g}" if isinstance(default, float) else f"{default}"
    if name in job.trained:
        shown = "as in the checkpoint's training" + f", else {shown}" * bool(shown)
    return f" (default: {shown})" * bool(shown)
