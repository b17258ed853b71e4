"""Progress of long jobs: a bar on a terminal, a few lines where the output goes to a file."""

from __future__ import annotations

import time

from tqdm import tqdm

SECONDS = 1.0  # between two lines; a job that takes less says nothing
SECONDS_WITHOUT_TOTAL = 60.0


class ProgressBar(tqdm):
    """tqdm's bar where standard error is a terminal; elsewhere one line for each tenth of the way.

    Where the total is not known, one line a minute.
    """

    def __init__(self, *args, **kwargs):
        self._tenths, self._told = 0, time.monotonic()
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.fp.isatty():
            super().display(msg, pos)
            return
        now = time.monotonic()
        tenths = int(10 * self.n / self.total) if self.total else self._tenths + 1
        if tenths > self._tenths and now - self._told >= (SECONDS if self.total else SECONDS_WITHOUT_TOTAL):
            self._tenths, self._told = tenths, now
            self.fp.write(f"{self._describe()}\n")
            self.fp.flush()

    def reset(self, total: float | None = None) -> None:
        self._tenths = 0
        super().reset(total)

    def close(self) -> None:
        if self.disable or self.fp.isatty():
            super().close()
        else:  # tqdm would end a line that was never begun
            self.disable = True
            self._decr_instances(self)

    def _describe(self) -> str:
        shown = self.format_dict
        size = self.format_sizeof if self.unit_scale else "{:,}".format
        amount = f"{size(self.n)}{f' of {size(self.total)}' if self.total else ''} {self.unit}"
        parts = [f"{100 * self.n / self.total:3.0f} %"] if self.total else []
        parts += [amount if self.unit == "B" else f"{amount}s"]
        rate = shown["rate"] or (self.n / shown["elapsed"] if shown["elapsed"] else 0)
        if self.total and rate:
            parts.append(f"{self.format_interval((self.total - self.n) / rate)} left")
        return f"{self.desc.removesuffix(': ') or 'done'}: {'  '.join(parts)}"
