"""Checks of one part of the GPU check, written down one by one, so that a crash loses none of them."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PASS, FAIL, SKIP, MISS = "PASS", "FAIL", "SKIP", "MISS"  # MISS: a target of speed is not met, which is no failure


@dataclass(frozen=True)
class Check:
    """A check that was made, or not made, and why."""

    part: str
    name: str
    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Options:
    """Options of a part.

    Attributes:
        device: "cpu" (tiny sizes, Triton's interpreter) or "cuda".
        quick: fewer cases and sizes.
        ignore_values: run everything, judge no value: on a pretend GPU.
        output: folder of the results.
        seconds: time that the part has.
    """

    device: str
    quick: bool
    ignore_values: bool
    output: Path
    seconds: float


class CheckLog:
    """The checks of a part, a line of JSON each in `path`."""

    def __init__(self, part: str, path: Path):
        self.part, self.path = part, path

    def add(self, name: str, status: str, detail: str = "", seconds: float = 0.0) -> None:
        """Write down a check."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Check(self.part, name, status, detail, round(seconds, 2)))) + "\n")

    @contextlib.contextmanager
    def judge(self, name: str) -> Iterator[list[str]]:
        """Pass a check unless the block raises; what it appends to the list is the detail."""
        begin, detail = time.perf_counter(), []
        try:
            yield detail
        except Exception as error:
            traceback.print_exc()
            self.add(name, FAIL, describe_error(error), time.perf_counter() - begin)
        else:
            self.add(name, PASS, " ".join(detail), time.perf_counter() - begin)


def read_checks(path: Path) -> list[Check]:
    """Return the checks written to a file, none if it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Check(**json.loads(line)) for line in lines]


def describe_error(error: BaseException) -> str:
    """Return type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
