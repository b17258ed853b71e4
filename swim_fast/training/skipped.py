"""Reports on samples: what was changed to fit, and what was left out of training."""

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

NOTES_LOGGED = 20  # such as "thinned from 32 to 18 frames"; a run on long videos has one for every sample


class SampleReport:
    """Log of notes and problems; problems are also appended to `skipped-rank<rank>.jsonl` in the output folder."""

    def __init__(self, folder: str, rank: int):
        self._path = Path(folder) / f"skipped-rank{rank}.jsonl"
        self._notes = 0

    def write(self, step: int, problems: list[str], notes: list[str] = ()) -> None:
        """Report on a batch; only the first notes of a run reach the log."""
        for note in notes:
            self._notes += 1
            logger.log(logging.INFO if self._notes <= NOTES_LOGGED else logging.DEBUG, "%s", note)
        if not problems:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:  # no lock, which some file systems refuse
            for problem in problems:
                logger.warning("skipped: %s", problem)
                file.write(json.dumps({"step": step, "problem": problem}, ensure_ascii=False) + "\n")
