"""The predictions of a run on disk: appended and flushed one by one, so that a run that was killed goes on.

Each rank appends to a file of its own, ``predictions-rank<N>.jsonl``: a first line with the settings of the run, then
one JSON object per record, with its number under ``record``. Those with ``problem`` are no predictions: a clip that
could not be used, which the next run tries again. A last line that was torn by a kill is predicted again. Any number of
ranks may go on with what any other number has left. Files of a run with other settings are refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_HEAD_BYTES = 1 << 20


class Predictions:
    """The predictions in a folder. To be closed, or used in a ``with`` statement.

    Args:
        folder: made if absent.
        settings: everything that predictions depend on, as JSON has it.

    Raises:
        ValueError: the folder holds predictions made with other settings.

    Attributes:
        done: record number -> its prediction, as the files had them when this was made.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self._file = None
        for path in self._paths():
            _refuse_other_run(path, settings)
        self.done = {number: entry for number, entry in self.entries().items() if "problem" not in entry}

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End adding; on file systems of a network only now do other machines see everything."""
        if self._file is not None:
            self._file.close()

    def open(self, rank: int) -> None:
        """Make ready to add predictions of a rank. All ranks must have been constructed before any of them opens.

        Raises:
            BlockingIOError: another run is writing there.
        """
        path = self.folder / f"predictions-rank{rank}.jsonl"
        self._file = open(path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{path} is in use by another run; wait for it or choose another --out") from None
        self._file.seek(0)
        whole = sum(len(line) for line in self._file if line.endswith(b"\n"))
        if whole < self._file.tell():
            logger.warning("%s: the last line was torn off; its record is predicted again", path)
            self._file.truncate(whole)
        if not whole:
            self._write({"settings": self.settings})

    def add(self, number: int, entry: dict[str, Any]) -> None:
        """Keep the prediction of a record; it is in the file when this returns."""
        self._write({"record": number, **entry})

    def entries(self) -> dict[int, dict[str, Any]]:
        """What the files of all ranks hold by now, problems included, in the order of the records.

        A prediction goes before a problem that another run had with the same record.
        """
        found: dict[int, dict[str, Any]] = {}
        for path in self._paths():
            for entry in _lines(path):
                number = entry.get("record")
                if isinstance(number, int) and ("problem" not in entry or "problem" in found.get(number, entry)):
                    found[number] = entry
        return dict(sorted(found.items()))

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("predictions-rank*.jsonl"))

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()


def stored_settings(folder: Path) -> dict[str, Any]:
    """The settings with which the predictions of a folder were made.

    Raises:
        ValueError: the folder holds no predictions.
    """
    for path in sorted(folder.glob("predictions-rank*.jsonl")):
        settings = next(_lines(path), {}).get("settings")
        if isinstance(settings, dict):
            return settings
    raise ValueError(f"{folder} holds no predictions to judge: leave --judge-only out, or name another --out")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    damaged = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                yield entry
            else:
                damaged += line.endswith(b"\n")
    if damaged:
        logger.warning("%s: %d damaged lines are passed over", path, damaged)


def _refuse_other_run(path: Path, settings: dict[str, Any]) -> None:
    stored = next(_lines(path), None)
    if stored is None:
        return  # killed before its first line was whole
    stored = stored.get("settings")
    if not isinstance(stored, dict):
        raise ValueError(f"{path} does not begin with the settings of its run; remove it or choose another --out")
    for name in dict.fromkeys((*settings, *stored)):
        if settings.get(name) != stored.get(name):
            raise ValueError(
                f"{path.parent} holds predictions of another run: {name} was {stored.get(name)!r} and is "
                f"{settings.get(name)!r}; go on with the same model, file and options, or choose another --out"
            )


def file_state(path: str | Path) -> str:
    """Tells apart files by their size and first and last megabyte."""
    size = os.stat(path).st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        file.seek(max(0, size - _HEAD_BYTES))
        digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()[:16]


def model_state(path: str) -> str:
    """Tells apart checkpoints that had one folder after one another, by size and time of their weights; a name on the
    hub is taken for one model."""
    folder = Path(path)
    if not folder.is_dir():
        return "by name"
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(weights) if file.exists()]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
