"""Files that appear whole or not at all, and logs that only grow."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from swim_fast.errors import UserError

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry")


class FileError(UserError, OSError):
    """A file that cannot be written; the message names it, the reason and the remedy."""


class FileInUseError(FileError, BlockingIOError):
    """A log that another process is appending to."""


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, which takes its place when the block ends without an exception.

    Readers see the old file or all of the new one, also after a crash. Any number of processes may write one path at
    the same time; the last one wins.

    Args:
        path: file to write or replace; its folder is made if absent.
        mode: "w" for UTF-8 text, "wb" for bytes.

    Raises:
        FileError: the folder or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # "x" creates a file under the umask, where `tempfile` would make one for its owner alone
        file = open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
    try:
        with file:
            yield file
            with _told(path):
                file.flush()
                os.fsync(file.fileno())
        with _told(path):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class AppendLog(Generic[Entry]):
    """JSON objects, one a line, appended by one process at a time. To be closed, or used in a `with` statement.

    Opening takes the file's lock. A last line that a kill has torn is cut off.

    Args:
        path: file; made, with its folder, if absent.
        parse: makes an entry of a JSON object; its KeyError, TypeError or ValueError marks the line as damaged.
        lost: what becomes of the entry of a torn line, for the log.
        remedy: what to do where another process has the file open, for the error.

    Raises:
        FileInUseError: another process has the file open.
        FileError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[dict[str, Any]], Entry] = dict,
        *,
        lost: str = "its entry is lost",
        remedy: str = "wait for it",
    ):
        self.path, self._parse = path, parse
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise FileInUseError(f"{path} is in use by another run; {remedy}") from None
        self._mend_end(lost)

    def __enter__(self) -> AppendLog[Entry]:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._file.close()

    def append(self, entry: dict[str, Any]) -> int:
        """Append an entry and return its offset; it is in the file when this returns."""
        with _told(self.path):
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        return offset

    def read(self, offset: int) -> Entry:
        """Return the entry at an offset that `append` or `entries` has named."""
        self._file.seek(offset)
        return self._parse(json.loads(self._file.readline()))

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """Yield the offset and entry of every sound line, see `read_log`."""
        return read_log(self.path, self._parse)

    def _mend_end(self, lost: str) -> None:
        size, line = 0, b"\n"
        self._file.seek(0)
        for line in self._file:
            size += len(line)
        if line.endswith(b"\n"):
            return
        try:
            _object(line)
            self._file.write(b"\n")
        except ValueError:
            logger.warning("%s: the last line was torn off; %s", self.path, lost)
            self._file.truncate(size - len(line))
        self._file.flush()


def read_log(path: Path, parse: Callable[[dict[str, Any]], Entry] = dict) -> Iterator[tuple[int, Entry]]:
    """Yield the offset and entry of every sound line of a log, also while a process appends to it.

    The number of damaged lines is logged. A torn last line counts as none.
    """
    offset = damaged = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                entry = parse(_object(line))
            except (KeyError, TypeError, ValueError):
                damaged += bool(line.strip()) and line.endswith(b"\n")
            else:
                yield offset, entry
            offset += len(line)
    if damaged:
        logger.warning("%s: %d damaged lines are passed over", path, damaged)


def _object(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn an OSError into one that names the file and a remedy."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{path} cannot be written: {error.strerror or error}; name another path or make it writable"
        ) from error
