"""Files of data sets: JSON with its mistakes named, lists of names, and what objects are called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swim_fast.data.source.errors import DataError


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file whose outermost value is a dict or list.

    Raises:
        DataError: missing, malformed, or something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}; name the right folder or file", source=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON: {error}", source=str(path)) from None
    if not isinstance(value, kind):
        raise DataError(f"is a JSON {type(value).__name__}, not a {kind.__name__}", source=str(path))
    return value


def entry(mapping: Any, key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    """Return a value of a JSON object.

    Raises:
        DataError: no object, no such key, or a value of another kind.
    """
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        known = f"; it has {', '.join(list(map(str, mapping))[:8])}" if isinstance(mapping, dict) else ""
        raise DataError(f"{found}, expected a {kinds}{known if value is None else ''}", key=where + key)
    return value


def exists(path: Path) -> bool:
    """Tell if a path exists; one that no file could have does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def dig(value: Any, *keys: str) -> Any:
    """Return what is below some keys of nested JSON objects; None where one of them is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", source=str(path)) from None


def find_folder(*candidates: Path) -> Path:
    """Return the first of some folders that exists.

    Raises:
        DataError: none does.
    """
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise DataError(f"there is no folder {' nor '.join(map(str, candidates))}; name it with --media")


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


@dataclass(frozen=True)
class Names:
    """Names of objects, from a file `{clip: {object: name}}` or `{object: name}`; numbers as 1 or 001."""

    path: str | None
    names: dict[str, Any]

    @classmethod
    def read(cls, path: str | None) -> Names:
        """Return the names of a file; none without one.

        Raises:
            DataError: it is no such file.
        """
        names = read_json(Path(path)) if path else {}
        for clip, value in names.items():
            values = value.values() if isinstance(value, dict) else [value]
            if not all(isinstance(name, str) and name.strip() for name in values):
                raise DataError("is neither a name nor {object: name}", source=path, key=clip)
        return cls(path, names)

    def find(self, clip: str, number: str, known: str | None = None) -> str:
        """Return what an object of a clip is called: what the file says, else `known`.

        Raises:
            DataError: neither says it.
        """
        here = self.names.get(clip)
        for names in (here if isinstance(here, dict) else {}, self.names):
            same = (name for key, name in names.items() if _number(key) == _number(number))
            if isinstance(name := next(same, None), str):
                return name
        if known is None:
            example = json.dumps({clip: {number: "dog"}})
            raise DataError(f"has no name; give it one in a JSON file with --names: {example}", key=f"object {number}")
        return known


def _number(key: str) -> str:
    """Return an object's number without zeros before it, another key as it is."""
    return key.lstrip("0") or "0" if key.isdecimal() else key
