"""Every answer that was paid for, kept the moment it arrives: a run that is stopped or killed pays nothing twice.

One JSON object a line: ``key`` (of the record and everything that was asked, see `answer_key`), ``record`` (its
number), ``answer`` (the model's text, as it came), ``tokens_in``, ``tokens_out``. Answers are judged anew whenever they
are read, so what is kept is what was paid for and not what was thought of it. The rejected answers of a record are kept
too and count as attempts. Entries of other models, prompts or versions of a record stay and are not used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A model's answer, and the tokens that the endpoint counted for it (0 where it counts none)."""

    answer: str
    tokens_in: int
    tokens_out: int


def answer_key(number: int, entry: dict, model: str, chat: list[dict[str, str]]) -> str:
    """What an answer is kept under: the record's place and whole contents, the model, and the whole prompt."""
    asked = json.dumps([number, entry, model, chat], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class Journal:
    """The answers in a file; only their places are held in memory. To be closed, or used in a ``with`` statement.

    Args:
        path: made if absent. A last line that was torn by a kill is cut off.

    Raises:
        OSError: the file cannot be written, or another run is using it.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BlockingIOError(f"{path} is in use by another run; wait for it or choose another --journal") from None
        self._places: dict[str, list[int]] = {}
        self._read_places()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other runs use it."""
        self._file.close()

    def answers(self, key: str) -> list[Answer]:
        """The answers kept under a key, in the order in which they came."""
        found = []
        for place in self._places.get(key, ()):
            self._file.seek(place)
            found.append(_parsed(self._file.readline())[1])
        return found

    def add(self, key: str, number: int, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        place = self._file.seek(0, 2)
        line = json.dumps({"key": key, "record": number, **asdict(answer)}, ensure_ascii=True)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._places.setdefault(key, []).append(place)

    def _read_places(self) -> None:
        self._file.seek(0)
        place = damaged = 0
        for line in self._file:
            try:
                key, _ = _parsed(line)
                self._places.setdefault(key, []).append(place)
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n"):
                    logger.warning("%s: the last line was torn off; its answer is asked for again", self.path)
                    self._file.truncate(place)
                    break
                damaged += bool(line.strip())
            else:
                if not line.endswith(b"\n"):
                    self._file.write(b"\n")
                    break
            place += len(line)
        self._file.flush()
        if damaged:
            logger.warning("%s: %d damaged lines are passed over", self.path, damaged)


def _parsed(line: bytes) -> tuple[str, Answer]:
    entry = json.loads(line)
    answer = Answer(str(entry["answer"]), int(entry["tokens_in"]), int(entry["tokens_out"]))
    return str(entry["key"]), answer
