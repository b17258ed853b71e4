"""Writes real video files whose frames carry their own number, so that a test knows which frame it was handed.

The number is drawn as large black and white squares, which survive lossy coding, over a gradient of colour.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

BITS = 12


def numbered_frame(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """One RGB frame uint8 [height, width, 3] showing ``number`` (< 4096) as 4 x 3 squares, highest bit first."""
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    bit = BITS - 1 - (rows[:, None] * 4 + columns[None, :])
    frame = np.empty((height, width, 3), np.uint8)
    frame[:] = (40 + 160 * ((number >> bit) & 1))[..., None]
    frame[..., 0] += np.linspace(0, 40, width).astype(np.uint8)[None, :]
    frame[..., 2] += np.linspace(0, 40, height).astype(np.uint8)[:, None]
    return frame


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames 0 … count - 1, uint8 [count, height, width, 3]."""
    return np.stack([numbered_frame(number, height, width) for number in range(count)])


def read_number(frame: np.ndarray) -> int:
    """The number that `numbered_frame` drew, read back from a decoded frame uint8 [H, W, 3]."""
    height, width = frame.shape[:2]
    number = 0
    for row in range(3):
        for column in range(4):
            y, x = (2 * row + 1) * height // 6, (2 * column + 1) * width // 8
            number = 2 * number + int(frame[y - 1 : y + 2, x - 1 : x + 2].mean() > 140)
    return number


def write_clip(
    path: str | Path,
    frames: np.ndarray | Sequence[np.ndarray],
    fps: float | Fraction = 10,
    *,
    codec: str = "libx264",
    pix_fmt: str | None = None,
    options: dict[str, str] | None = None,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    title: str | None = None,
) -> Path:
    """Encode ``frames`` (RGB uint8, [T, H, W, 3]) with PyAV and return the path.

    Args:
        fps: frames per second.
        codec: encoder; the container follows from the file's suffix.
        pix_fmt: by default yuv420p, or yuv444p for odd sizes, which 4:2:0 cannot code.
        options: encoder options, such as ``{"bf": "3", "g": "12"}`` for B-frames and the key-frame distance.
        times: presentation time of each frame in seconds (variable frame rate); rounded to 1/1000 s.
        rotation: display rotation in degrees clockwise, written into the track header of an mp4.
        title: metadata of the file.
    """
    av = pytest.importorskip("av")
    path = Path(path)
    height, width = frames[0].shape[:2]
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "12", "threads": "1", **(options or {})})
        if title is not None:
            container.metadata["title"] = title
        stream.width, stream.height = width, height
        stream.pix_fmt = pix_fmt or ("yuv444p" if height % 2 or width % 2 else "yuv420p")
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts = number if times is None else round(times[number] * 1000)
            frame.time_base = Fraction(1, 1000) if times is not None else 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotation:
        _set_rotation(path, rotation)
    return path


def _set_rotation(path: Path, degrees: int) -> None:
    """Overwrite the display matrix in the track header (`tkhd`, version 0) of an mp4 file."""
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one, unit = 1 << 16, 1 << 30
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # after version/flags, times, track id, duration, layer, group, volume
    data[matrix : matrix + 36] = struct.pack(">9i", a * one, b * one, 0, -b * one, a * one, 0, 0, 0, unit)
    path.write_bytes(data)
