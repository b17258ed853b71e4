"""Every answer that was paid for, kept the moment it arrives: a run that is stopped or killed pays nothing twice.

One JSON object a line: `key` (hash of the record and of everything that was asked, see `answer_key`), `record` (its
index), `answer` (the model's text as it came), `tokens_in`, `tokens_out`. Answers are judged anew whenever they are
read, so the file holds what was paid for and no verdict. Rejected answers are kept too and count as attempts. Entries
of other models, prompts or versions of a record stay and are not used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swim_fast.files import AppendLog


@dataclass(frozen=True)
class Answer:
    """A model's answer, and the tokens that the endpoint counted for it (0 where it counts none)."""

    answer: str
    tokens_in: int
    tokens_out: int


def answer_key(number: int, entry: dict, model: str, chat: list[dict[str, str]]) -> str:
    """Return the key of an answer: a hash of the record's index and contents, the model, and the whole prompt."""
    asked = json.dumps([number, entry, model, chat], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class Journal(AppendLog[tuple[str, Answer]]):
    """The answers in a file, of which only the offsets are held in memory; see `AppendLog`.

    Args:
        path: file of the answers; made if absent.

    Raises:
        FileInUseError: another run is using the file.
        FileError: the file cannot be written.
    """

    def __init__(self, path: Path):
        remedy = "wait for it or choose another --journal"
        super().__init__(path, _parse, lost="its answer is asked for again", remedy=remedy)
        self._offsets: dict[str, list[int]] = {}
        for offset, (key, _) in self.entries():
            self._offsets.setdefault(key, []).append(offset)

    def answers(self, key: str) -> list[Answer]:
        """Return the answers kept under a key, in the order in which they came."""
        return [self.read(offset)[1] for offset in self._offsets.get(key, ())]

    def add(self, key: str, number: int, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        offset = self.append({"key": key, "record": number, **asdict(answer)})
        self._offsets.setdefault(key, []).append(offset)


def _parse(entry: dict[str, Any]) -> tuple[str, Answer]:
    answer = Answer(str(entry["answer"]), int(entry["tokens_in"]), int(entry["tokens_out"]))
    return str(entry["key"]), answer
