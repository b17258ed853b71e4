"""Writing record files: whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


class RecordWriter:
    """Writes records one by one to a JSONL file, or to a JSON list where the name ends in ``.json``.

    They go to a temporary file beside it, which takes the place of ``path`` only when the ``with`` block ends without
    an exception.

    Args:
        path: the file; its folder is made if absent.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = 0
        self._as_list = self.path.suffix.lower() == ".json"

    def __enter__(self) -> RecordWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, self._temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp")
        self._file = os.fdopen(handle, "wb")
        return self

    def write(self, entry: dict) -> None:
        """Add a record."""
        try:
            line = json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair can only be written as \ud800
            line = json.dumps(entry).encode()
        if self._as_list:
            line = (b",\n" if self.count else b"[\n") + line
        self._file.write(line if self._as_list else line + b"\n")
        self.count += 1

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                if self._as_list:
                    self._file.write(b"\n]\n" if self.count else b"[]\n")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                mask = os.umask(0)
                os.umask(mask)
                os.chmod(self._temporary, 0o666 & ~mask)  # mkstemp's files are their owner's alone
                os.replace(self._temporary, self.path)
                return
        except BaseException:
            self._discard()
            raise
        self._discard()

    def _discard(self) -> None:
        self._file.close()
        Path(self._temporary).unlink(missing_ok=True)


def check_distinct(source: str | Path, **written: str | Path | None) -> None:
    """Raise ValueError if two of the files are the same one.

    Args:
        source: the file that is read.
        written: those that are written, by the name of their option.
    """
    seen = {Path(source).resolve(): "the input"}
    for name, path in written.items():
        if path is None:
            continue
        path = Path(path).resolve()
        if path in seen:
            raise ValueError(f"--{name} {path} is {seen[path]} as well; name another file")
        seen[path] = f"--{name}"


def media_note(source: str | Path, out: str | Path) -> list[str]:
    """A line for the report, where relative media paths no longer start from the folder of their file; else none."""
    folder = Path(source).resolve().parent
    if Path(out).resolve().parent == folder:
        return []
    return [f"  media paths still start from {folder}: name it as the file's media folder"]
