"""A pretend GPU: an H100 whose memory is host memory and whose kernels do nothing.

PyTorch's dispatch, its allocator and autograd, Triton's compiler and launcher are the real ones, so launches, copies
and waits of the host can be counted, with the Python code that asked for them. *Values are not*: what a kernel should
have written is zero or whatever was there before.

    python -m tests.helpers.pretend_gpu COMMAND…    runs a command on it (PRETEND_GPUS says how many, 1)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
KINDS = ("launch", "copy", "fill", "wait", "allocation")
_RUNTIME, _COMPILER = "libpretend_runtime.so", "libnvrtc.so.13"
_LIBRARIES = {"runtime.c": _RUNTIME, "compiler.c": _COMPILER, "driver.c": "libcuda.so.1"}
_WATCHER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)


def is_running() -> bool:
    """Return True in a process on the pretend GPU."""
    return "PRETEND_GPUS" in os.environ


def build(folder: Path) -> dict[str, str]:
    """Compile the libraries into a folder and return the environment variables of a process that uses them.

    Raises:
        subprocess.CalledProcessError: there is no C compiler, or it fails.
    """
    import triton

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in _LIBRARIES.items():
        options = ["-std=gnu17", "-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-I", str(headers)]
        if name == _COMPILER:
            options.append("-Wl,--default-symver")  # PyTorch asks for its symbols by version
        subprocess.run(["cc", *options, "-o", str(folder / name), str(HERE / source), "-ldl"], check=True)
    return {
        "LD_PRELOAD": f"{folder / _RUNTIME}:{folder / _COMPILER}",
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
        "PRETEND_GPUS": os.environ.get("PRETEND_GPUS", "1"),
    }


@dataclass(frozen=True)
class Event:
    """A launch, copy, fill, wait or allocation.

    Attributes:
        kind: one of `KINDS`.
        name: of the kernel or function, as it was registered; of Triton's kernels with the grid.
        num_bytes: of a copy, fill or allocation.
        device: index of the current device.
        stack: Python frames of the thread that asked for it, outermost first: file, line and function.
    """

    kind: str
    name: str
    num_bytes: int
    device: int
    stack: tuple[str, ...]

    @property
    def place(self) -> str:
        """The innermost frame outside of PyTorch and this instrument."""
        frames = [frame for frame in self.stack if not re.match(r"(torch|triton|tests/helpers/pretend_gpu)/", frame)]
        return frames[-1] if frames else "backward of torch"

    @property
    def is_ours(self) -> bool:
        """True if the innermost frame outside of PyTorch is in one of our packages."""
        return self.place.startswith(("swim_fast/", "swim_kernels/"))


@dataclass
class Record:
    """Events in the order in which they happened."""

    events: list[Event] = field(default_factory=list)

    def of(self, kind: str, inside: str = "", ours: bool = False) -> list[Event]:
        """Return the events of a kind: those with a frame that holds this text, or those of our packages alone."""
        events = [event for event in self.events if event.kind == kind and (event.is_ours or not ours)]
        return [event for event in events if any(inside in frame for frame in event.stack or ("",))]

    def count(self, kind: str, inside: str = "", ours: bool = False) -> int:
        """Return the number of events of a kind, see `of`."""
        return len(self.of(kind, inside, ours))

    def describe(self, kind: str, inside: str = "", ours: bool = False) -> str:
        """Return one line for each place: how often, where, and the first name of what was asked for."""
        events = self.of(kind, inside, ours)
        names = {e.place: e.name for e in reversed(events)}
        counts = Counter(event.place for event in events)
        return "\n".join(f"{n:5} × {place}  ({names[place][:90]})" for place, n in counts.items())


@contextlib.contextmanager
def record() -> Iterator[Record]:
    """Record what the process asks of the pretend GPU."""
    result = Record()

    def watch(kind: int, name: bytes, num_bytes: int, device: int) -> None:
        frames = traceback.extract_stack()[:-1]
        stack = tuple(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames)
        result.events.append(Event(KINDS[kind], name.decode(), num_bytes, device, stack))

    runtime = ctypes.CDLL(None)
    watcher = _WATCHER(watch)
    runtime.pretend_watch(watcher)
    try:
        yield result
    finally:
        runtime.pretend_watch(_WATCHER())


def _short(path: str) -> str:
    """Return the part of a path that begins with a package."""
    return re.sub(r".*?/(site-packages/|(?=(swim_fast|swim_kernels|tests)/))", "", path)
