"""Frames of videos, folders of frames and images, decoded in a child process that may hang or crash at no cost.

All readers number frames alike: displayed frames, from 0, in presentation order. Frames are upright: rotation metadata
of the container and EXIF orientation are applied.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swim_fast.data.source.errors import DataError
from swim_fast.errors import MissingLibraryError
from swim_fast.options import Decoding

START_SECONDS = 300.0  # importing torch from a cold network disk takes its time
STDERR_KEPT = 2000
PIPE_BYTES = 1 << 20
Change = Callable[[np.ndarray], np.ndarray]
F_SETPIPE_SZ = 1031  # Linux; fcntl names it from Python 3.10 on, but not everywhere


@dataclass(frozen=True)
class MediaInfo:
    """Number, rate and size of a clip's frames.

    Attributes:
        num_frames: displayed frames.
        fps: average frame rate, also where the rate varies (readers differ by a few per cent there, in whether the last
            frame has a duration), and 1 for images and folders of frames.
        height, width: size of the upright frame in pixels.
    """

    num_frames: int
    fps: float
    height: int
    width: int


class FrameReader:
    """Decodes frames in one child process, which starts with the first request and is replaced when it fails.

    One request at a time: give each thread its own reader. May be pickled, and used after a fork: each process starts
    a child of its own. The child ends with this object, and with this process however it ends.

    Args:
        decoding: the library, which is never replaced by another one, and the seconds that one request may take, not
            counting the start of the child.

    Raises (from `info` and `frames`):
        DataError: the clip is missing, broken, too slow, has no such frame, or crashed the decoder.
        MissingLibraryError: the library is not installed or does not load.
        RuntimeError: the child does not start.
    """

    def __init__(self, decoding: Decoding = Decoding()):
        self.reader, self.timeout = decoding.reader, decoding.decode_timeout
        self._child: _Child | None = None
        self._process_id = 0

    def info(self, path: str | Path, kind: str = "video") -> MediaInfo:
        """Return number, rate and size of the frames of the clip at `path` (`kind`: `video` or `image`)."""
        head, _ = self._ask(path, kind, {"op": "info"})
        return MediaInfo(**head)

    def frames(
        self, path: str | Path, indices: Sequence[int], kind: str = "video", change: Change | None = None
    ) -> np.ndarray:
        """Return exactly the frames asked for, in that order, repeated ones too: uint8 RGB [len(indices), H, W, 3].

        Args:
            change: applied to each frame as it arrives, such as to make it smaller; gives arrays of one shape. Only one
                frame is then held as it was decoded, and it is written over by the next.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1 or not len(wanted):
            raise ValueError("indices must be a non-empty list of frame indices")
        distinct, inverse = np.unique(wanted, return_inverse=True)
        _, frames = self._ask(path, kind, {"op": "frames", "indices": distinct.tolist()}, change)
        return frames if np.array_equal(distinct, wanted) else frames[inverse]

    def compare(self, path: str | Path) -> bool:
        """Compare a clip's index with its frames decoded in a row; True if time was enough for the whole clip.

        Raises:
            DataError: they differ; or as above.
        """
        return self._ask(path, "video", {"op": "compare"})[0]["complete"]

    def stock_differences(self, path: str | Path, indices: Sequence[int]) -> list[int]:
        """Return those of sorted frame indices for which decord's own `get_batch` gives other frames than displayed.

        Only of reader decord, and of video files.
        """
        return self._ask(path, "video", {"op": "stock", "indices": list(indices)})[0]["differ"]

    def close(self) -> None:
        """Stop the child. The next request starts a new one."""
        child, self._child = self._child, None
        if child is not None:
            # After a fork the child belongs to the other process: let go of our copies of its pipes.
            child.stop() if self._process_id == os.getpid() else child.forget()

    def _ask(
        self, path: str | Path, kind: str, request: dict, change: Change | None = None
    ) -> tuple[dict, np.ndarray | None]:
        if kind not in ("video", "image"):
            raise ValueError(f"kind is {kind!r}: it must be 'video' or 'image'")
        what = f"{kind} {path}"
        if self._child is None or self._process_id != os.getpid() or self._child.process.poll() is not None:
            self.close()
            self._child, self._process_id = _Child(self.reader), os.getpid()
        # An absolute path is no protocol, whatever colons it holds, and the same to a child that started elsewhere.
        request = {**request, "path": os.path.abspath(path), "kind": kind, "seconds": self.timeout}
        try:
            head, frames = self._child.ask(request, self.timeout, change)
        except TimeoutError:
            self.close()
            faster = ", or use reader torchcodec or pyav, which are faster on long clips" * (self.reader == "decord")
            raise DataError(
                f"{what}: decoding took longer than the limit of {self.timeout:g} s and was stopped; check the file, "
                f"raise the limit{faster}"
            ) from None
        except EOFError:
            self._child.process.wait()
            code, noise = self._child.process.returncode, self._child.noise()
            self.close()
            raise DataError(f"{what}: it crashed the {self.reader} decoder (exit status {code}){noise}") from None
        except BaseException:
            self.close()  # an answer may be under way; do not mistake it for the next one
            raise
        if "error" in head:
            raise DataError(f"{what}: {head['error']}{self._child.noise()}")
        return head, frames

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        with contextlib.suppress(Exception):  # half-built object, interpreter shutting down
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_child": None, "_process_id": 0}


class _Child:
    """The child process and the pipes to it; every read and write has a deadline."""

    def __init__(self, reader: str):
        environment = {
            **os.environ,
            # The child finds what this process finds, and nothing in the current folder.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONSAFEPATH": "1",
            # One decoder thread a worker: parallelism comes from the number of workers.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            # glibc keeps what a clip's frames took for the next one's, as `keep_freed_memory` has it do in workers.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "swim_fast.data.video.decode_child", reader],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        self._stderr = b""
        for pipe in self._pipes():
            os.set_blocking(pipe.fileno(), False)
        with contextlib.suppress(ImportError, OSError):  # a larger pipe is faster, and not always granted
            import fcntl

            fcntl.fcntl(self.process.stdout.fileno(), F_SETPIPE_SZ, PIPE_BYTES)
        try:
            head = self._head(time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError) as error:
            self.stop()
            problem = "ended" if isinstance(error, EOFError) else f"was not ready after {START_SECONDS:g} s"
            raise RuntimeError(f"the decoding process of reader {reader} {problem}{self.noise()}") from None
        except BaseException:
            self.stop()
            raise
        if "unavailable" in head:
            self.stop()
            raise MissingLibraryError(head["unavailable"])

    def ask(self, request: dict, seconds: float, change: Change | None = None) -> tuple[dict, np.ndarray | None]:
        """Send a request; return the answer's head and frames. TimeoutError or EOFError: stop this child."""
        deadline = time.monotonic() + seconds
        self._drain_stderr()
        self._stderr = b""
        with contextlib.suppress(BrokenPipeError):  # it has died: reading says so
            self._write(json.dumps(request).encode() + b"\n", deadline)
        head = self._head(deadline)
        if "shape" not in head:
            return head, None
        count, *shape = head["shape"]
        if change is None:
            frames = np.empty((count, *shape), np.uint8)
            self._read(memoryview(frames).cast("B"), deadline)
            return head, frames
        frame, changed = np.empty(shape, np.uint8), None
        for number in range(count):
            self._read(memoryview(frame).cast("B"), deadline)
            new = change(frame)
            changed = np.empty((count, *new.shape), new.dtype) if changed is None else changed
            changed[number] = new
        return head, changed

    def noise(self) -> str:
        """Return the end of the decoder's output during the last request, as an addition to an error message."""
        self._drain_stderr()
        lines = [line.strip() for line in self._stderr.decode(errors="replace").splitlines() if line.strip()]
        return f" [decoder's output: {' | '.join(lines[-4:])}]" if lines else ""

    def stop(self) -> None:
        # Nothing to lose in there, and it may be deaf to anything but SIGKILL.
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel on a dead disk: leave it behind
            self.process.wait(timeout=5)
        self._drain_stderr()
        self._close_pipes()

    def forget(self) -> None:
        self.process.returncode = 0  # not ours to wait for
        self._close_pipes()

    def _pipes(self) -> tuple:
        return self.process.stdin, self.process.stdout, self.process.stderr

    def _close_pipes(self) -> None:
        for pipe in self._pipes():
            with contextlib.suppress(OSError):
                pipe.close()

    def _head(self, deadline: float) -> dict:
        size = bytearray(4)
        self._read(memoryview(size), deadline)
        text = bytearray(struct.unpack("<I", size)[0])
        self._read(memoryview(text), deadline)
        return json.loads(text)

    def _read(self, view: memoryview, deadline: float) -> None:
        stdout = self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(self.process.stderr.fileno(), selectors.EVENT_READ)
            while len(view):
                self._wait(selector, deadline)
                if not self._drain_stderr():
                    with contextlib.suppress(KeyError):
                        selector.unregister(self.process.stderr.fileno())
                with contextlib.suppress(BlockingIOError):
                    count = os.readv(stdout, [view])
                    if count == 0:
                        raise EOFError
                    view = view[count:]

    def _write(self, data: bytes, deadline: float) -> None:
        stdin = self.process.stdin.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            while data:
                self._wait(selector, deadline)
                data = data[os.write(stdin, data) :]

    @staticmethod
    def _wait(selector: selectors.BaseSelector, deadline: float) -> None:
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise TimeoutError

    def _drain_stderr(self) -> bool:
        """Read the child's errors and keep their end, so that it never blocks on them; False once they are closed."""
        with contextlib.suppress(BlockingIOError, OSError, ValueError):
            while data := os.read(self.process.stderr.fileno(), 1 << 16):
                self._stderr = (self._stderr + data)[-STDERR_KEPT:]
            return False
        return True
