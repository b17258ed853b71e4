"""Reports on samples: what was changed to fit, and what was left out of training."""

import json
import logging
from collections import deque
from pathlib import Path

from accelerate.utils import gather_object

from swim_fast.errors import UserError

logger = logging.getLogger(__name__)

NOTES_LOGGED = 20  # such as "thinned from 32 to 18 frames"; a run on long videos has one for every sample
WINDOW = 100  # samples, at least, that a share is judged by
FEWEST = 8  # samples, one after the other, that stop a run if all are left out; a step may have one sample only
REASONS_SHOWN = 3


class SkippedError(UserError, ValueError):
    """The run was stopped since too many samples were left out; the message says how many and why."""


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


class SkipLimit:
    """Limit on the samples that are left out for their problems, with the same answer on every rank.

    Args:
        share: of the last `WINDOW` samples, above which the run stops. It also stops after steps without any sample to
            train on, `FEWEST` samples in all, and before a checkpoint of a run that has trained on none.
    """

    def __init__(self, share: float):
        self.share = share
        self._window: deque[tuple[int, int]] = deque()  # samples and skipped samples of each step
        self._problems: deque[str] = deque(maxlen=REASONS_SHOWN)  # of this rank
        self._trained = False
        self._without = 0  # samples since the last that was trained on

    def note(self, problems: list[str]) -> None:
        """Keep the last problems of this rank, to be told if the run stops."""
        self._problems.extend(problems)

    def check_step(self, step: int, samples: int, skipped: int, saving: bool) -> None:
        """Judge a step; all ranks call this together.

        Args:
            step: index of the optimizer step, counted from 1.
            samples, skipped: of all ranks; the first counts the second too.
            saving: a checkpoint, or the trained model, is about to be written.

        Raises:
            SkippedError: too many are left out.
        """
        self._window.append((samples, skipped))
        while sum(read for read, _ in self._window) - self._window[0][0] >= WINDOW:
            self._window.popleft()
        self._trained |= samples > skipped
        self._without = self._without + skipped if skipped == samples else 0
        read, left_out = (sum(column) for column in zip(*self._window, strict=True))
        if self._without >= FEWEST or (saving and not self._trained and self._without):
            self._stop(step, f"all of the last {self._without} samples were left out")
        if read >= WINDOW and left_out > self.share * read:
            self._stop(step, f"{left_out} of the last {read} samples were left out, more than data.max_skipped allows")

    def _stop(self, step: int, what: str) -> None:
        reasons = list(dict.fromkeys(gather_object(list(self._problems))))
        more = "; ".join(reasons[:REASONS_SHOWN])
        raise SkippedError(
            f"step {step}: {what}, and nothing was saved for this step: {more}. All are in skipped-rank*.jsonl of the "
            "output folder; `swim-fast data check` looks at every record, and data.max_skipped sets the share"
        )
