"""Files of records: written as a whole or not at all, and never over one that is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from swim_fast.errors import OptionError
from swim_fast.files import atomic_write


@contextmanager
def record_writer(path: str | Path) -> Iterator[Callable[[dict], None]]:
    """Yield a function that adds a record to a JSONL file, or to a JSON list where the name ends in `.json`.

    The file takes its place when the block ends without an exception; see `atomic_write`.
    """
    as_list = Path(path).suffix.lower() == ".json"
    separator = b"[\n"
    with atomic_write(path, "wb") as file:

        def write(entry: dict) -> None:
            nonlocal separator
            try:
                line = json.dumps(entry, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # half a surrogate pair can only be written as \ud800
                line = json.dumps(entry).encode()
            file.write(separator + line if as_list else line + b"\n")
            separator = b",\n"

        yield write
        if as_list:
            file.write(b"\n]\n" if separator == b",\n" else b"[]\n")


def check_distinct(source: str | Path, **written: str | Path | None) -> None:
    """Refuse two files that are the same one.

    Args:
        source: file that is read.
        written: files that are written, by the name of their option.

    Raises:
        OptionError: naming both.
    """
    seen = {Path(source).resolve(): "the input"}
    for name, path in written.items():
        if path is None:
            continue
        path = Path(path).resolve()
        if path in seen:
            raise OptionError(f"--{name} {path} is {seen[path]} as well; name another file")
        seen[path] = f"--{name}"


def media_note(source: str | Path, out: str | Path) -> list[str]:
    """Return a line for the report if relative media paths no longer start from the folder of their file, else none."""
    folder = Path(source).resolve().parent
    if Path(out).resolve().parent == folder:
        return []
    return [f"  media paths still start from {folder}: name it as the file's media folder"]
