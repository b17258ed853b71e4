"""The decoding child process: `python -m swim_fast.data.video.decode_child READER`.

Native decoders can hang with the interpreter locked or crash the process; here neither hurts the trainer. The parent
side is `swim_fast.data.video.reader.FrameReader`. Imports numpy and the one decoder asked for, to start quickly.

Requests arrive on stdin, one JSON object a line: `{"op", "path", "kind", "indices", "seconds"}`, where `op` is `info`,
`frames`, or a comparison of `swim_fast.data.video.crosscheck`: `compare` or `stock`.
Every answer on stdout is a 4-byte little-endian length, that many bytes of JSON and, when the JSON holds `shape`, the
frames as raw uint8. The first answer, `{"ready": true}` or `{"unavailable": reason}`, comes unasked.

Frame indices count *displayed* frames from 0 (presentation order; frames that an edit list hides do not count), and
each frame is upright, as players show it: rotation metadata (multiples of 90 degrees) and EXIF orientation are applied.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
import sys
from pathlib import Path

import numpy as np

from swim_fast.data.video.containers import Broken
from swim_fast.data.video.crosscheck import compare_in_a_row, stock_differences
from swim_fast.data.video.decoders import DecordClip, PyAVClip, TorchCodecClip
from swim_fast.data.video.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Images, natural_order

GRACE_SECONDS = 5.0  # the parent stops a slow child first; this child's own alarm is for when the parent is gone


def open_clip(path: str, kind: str, video_class: type):
    """Open a video file, a folder of frames or an image; raises `Broken` or whatever the decoder raises."""
    file = Path(path)
    if not file.exists():
        raise Broken("no such file; check the record and the media folder it is looked up in")
    if kind == "image":
        if file.is_dir() or file.suffix.lower() in VIDEO_SUFFIXES:
            raise Broken("it is a video; name it under the key `video`")
        clip = Images([file])
    elif file.is_dir():
        names = sorted((name for name in os.listdir(file) if not name.startswith(".")), key=natural_order)
        paths = [file / name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        if not paths:
            raise Broken(f"the folder holds no images ({' '.join(IMAGE_SUFFIXES)})")
        clip = Images(paths)
    elif file.suffix.lower() in IMAGE_SUFFIXES:
        raise Broken("it is a picture; name it under the key `image`")
    else:
        clip = video_class(path)
    if clip.num_frames < 1:
        raise Broken("the clip has no frames")
    if not (clip.fps > 0 and math.isfinite(clip.fps)):
        if clip.num_frames > 1:
            raise Broken("the frame rate is unknown; re-encode the clip")
        clip.fps = 1.0
    return clip


def answer(clip, request: dict) -> tuple[dict, np.ndarray | None]:
    if request["op"] == "info":
        names = ("num_frames", "fps", "height", "width")
        return {name: getattr(clip, name) for name in names}, None
    if request["op"] == "compare":
        return {"complete": isinstance(clip, Images) or compare_in_a_row(clip, request["seconds"])}, None
    indices = request["indices"]
    beyond = [index for index in indices if not 0 <= index < clip.num_frames]
    if beyond:
        raise Broken(
            f"frame number {beyond[0]} is past the end: the clip has {clip.num_frames} frames, 0 to "
            f"{clip.num_frames - 1}; do the annotations belong to this file?"
        )
    if request["op"] == "stock":
        return {"differ": stock_differences(clip, indices)}, None
    frames = np.empty((len(indices), clip.height, clip.width, 3), np.uint8)
    clip.read(indices, frames)
    return {"shape": frames.shape}, frames


def load_reader(name: str) -> type:
    """Import the library behind a reader; ImportError with the remedy where it cannot be used."""
    package = {"decord": "decord", "torchcodec": "torchcodec", "pyav": "av"}[name]
    try:
        module = __import__(package)
    except ImportError as error:
        raise ImportError(f"reader {name} cannot be imported ({error}): pip install {package}") from None
    if name == "decord":
        module.logging.set_level(module.logging.ERROR)
        return DecordClip
    if name == "pyav":
        return PyAVClip
    import torch
    from torchcodec.decoders import VideoDecoder

    torch.set_num_threads(1)
    try:
        VideoDecoder(b"not a video")  # loads FFmpeg, then complains
    except Exception as error:
        if "libtorchcodec" in str(error):
            raise ImportError(
                "reader torchcodec finds no shared FFmpeg libraries (versions 4 to 9): install FFmpeg, or choose "
                "reader decord or pyav, which bring their own"
            ) from None
    return TorchCodecClip


def explain(error: Exception) -> str:
    """Return one line of a library's error, without the source positions and numbers that libraries put in front."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: |\w+, \S+\.cpp:\d+, |\[Errno \d+\] ", "", line).strip()
    return f"cannot be decoded ({line}); check that the file is whole, re-encode it, or try another reader"


def main() -> None:
    # Libraries that print get the parent's stderr pipe; only we write to the answer pipe.
    answers = os.dup(1)
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and preemption reach every process; the parent decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def send(head: dict, frames: np.ndarray | None = None) -> None:
        text = json.dumps(head).encode()
        parts: list[bytes | memoryview] = [struct.pack("<I", len(text)) + text]
        parts += [] if frames is None else [memoryview(frames).cast("B")]
        for part in parts:
            while len(part):
                part = part[os.write(answers, part) :]

    try:
        video_class = load_reader(sys.argv[1])
    except ImportError as error:
        send({"unavailable": str(error)})
        return
    send({"ready": True})
    opened, clip = None, None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The default action of SIGALRM ends the process whatever the native code is doing, and needs no parent.
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + GRACE_SECONDS)
        frames = None
        try:
            if opened != (request["path"], request["kind"]):
                opened, clip = None, None
                clip = open_clip(request["path"], request["kind"], video_class)
                opened = request["path"], request["kind"]
            head, frames = answer(clip, request)
        except Exception as error:
            opened, clip = None, None
            head = {"error": str(error) if isinstance(error, Broken) else explain(error)}
        send(head, frames)
        del frames
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        pass
    os._exit(0)  # the parent is gone or wants us gone: do not wait for decoder threads
