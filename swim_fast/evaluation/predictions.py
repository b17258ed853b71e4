"""The predictions of a run on disk, appended one by one, so that a run that was killed resumes.

Each rank appends to a log of its own (`AppendLog`), `predictions-rank<N>.jsonl`: a first line with the settings of the
run, then one JSON object per record, with its index under `record`. Those with `problem` are no predictions: their clip
could not be used, and the next run tries it again. Any number of ranks may resume what any other number has left. Files
of a run with other settings are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from swim_fast.errors import UserError
from swim_fast.files import AppendLog, read_log

_HEAD_BYTES = 1 << 20


class PredictionsError(UserError, ValueError):
    """A folder whose predictions cannot be used; the message says why, and what to do."""


class Predictions:
    """The predictions in a folder. To be closed, or used in a `with` statement.

    Args:
        folder: made if absent.
        settings: everything that predictions depend on, as JSON has it.

    Raises:
        PredictionsError: the folder holds predictions made with other settings.

    Attributes:
        done: record index -> its prediction, as the files had them when this was made.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self._log: AppendLog | None = None
        for path in _paths(folder):
            _refuse_other_run(path, settings)
        self.done = {index: entry for index, entry in self.entries().items() if "problem" not in entry}

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End adding; on file systems of a network only now do other machines see everything."""
        if self._log is not None:
            self._log.close()

    def open(self, rank: int) -> None:
        """Make ready to add predictions of a rank. All ranks must have been constructed before any of them opens.

        Raises:
            FileInUseError: another run is writing there.
        """
        path = self.folder / f"predictions-rank{rank}.jsonl"
        remedy = "wait for it or choose another --out"
        self._log = AppendLog(path, lost="its record is predicted again", remedy=remedy)
        if next(self._log.entries(), None) is None:
            self._log.append({"settings": self.settings})

    def add(self, index: int, entry: dict[str, Any]) -> None:
        """Keep the prediction of a record; it is in the file when this returns."""
        self._log.append({"record": index, **entry})

    def entries(self) -> dict[int, dict[str, Any]]:
        """Return what the files of all ranks hold by now, problems included, in the order of the records.

        A prediction goes before a problem that another run had with the same record.
        """
        found: dict[int, dict[str, Any]] = {}
        for path in _paths(self.folder):
            for _, entry in read_log(path):
                index = entry.get("record")
                if isinstance(index, int) and ("problem" not in entry or "problem" in found.get(index, entry)):
                    found[index] = entry
        return dict(sorted(found.items()))


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings with which the predictions of a folder were made.

    Raises:
        PredictionsError: the folder holds no predictions.
    """
    for path in _paths(folder):
        _, entry = next(read_log(path), (0, {}))
        if isinstance(settings := entry.get("settings"), dict):
            return settings
    raise PredictionsError(f"{folder} holds no predictions to judge: leave --judge-only out, or name another --out")


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("predictions-rank*.jsonl"))


def _refuse_other_run(path: Path, settings: dict[str, Any]) -> None:
    _, entry = next(read_log(path), (0, None))
    if entry is None:
        return  # killed before its first line was whole
    stored = entry.get("settings")
    if not isinstance(stored, dict):
        raise PredictionsError(f"{path} does not begin with the settings of its run; remove it or choose another --out")
    for name in dict.fromkeys((*settings, *stored)):
        if settings.get(name) != stored.get(name):
            raise PredictionsError(
                f"{path.parent} holds predictions of another run: {name} was {stored.get(name)!r} and is "
                f"{settings.get(name)!r}; resume with the same model, file and options, or choose another --out"
            )


def file_state(path: str | Path) -> str:
    """Return a hash that tells apart files by their size and first and last megabyte."""
    size = os.stat(path).st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        file.seek(max(0, size - _HEAD_BYTES))
        digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()[:16]


def model_state(path: str) -> str:
    """Return a hash that tells apart checkpoints that followed one another in a folder, by size and time of their
    weights; a name on the hub is taken for one model."""
    folder = Path(path)
    if not folder.is_dir():
        return "by name"
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(weights) if file.exists()]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
