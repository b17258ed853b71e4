"""Read the displayed frames' count, times and sizes from a container, without any decoder."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

_PACKETS = ((0, 188), (4, 192))  # first sync byte and packet length of transport streams, plain and with time stamps


class Broken(Exception):
    """The clip cannot be used; the message says why and what to do."""


def refuse_mpeg_stream(path: str, reader: str) -> None:
    """Raise `Broken` for MPEG transport and program streams, which have no index.

    decord starts them in the middle and torchcodec lands on wrong frames, both silently; PyAV reads them well.
    """
    with open(path, "rb") as file:
        head = file.read(600)
    packets = any(len(head) > at + 2 * size and set(head[at : at + 3 * size : size]) == {0x47} for at, size in _PACKETS)
    if packets or head.startswith(b"\x00\x00\x01\xba"):
        raise Broken(f"{reader} cannot number the frames of an MPEG stream; use reader pyav, or remux the clip to mp4")


def refuse_avi(path: str) -> None:
    """Raise `Broken` for AVI files, which keep no times: torchcodec is off by one or two in them, silently."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        raise Broken("torchcodec cannot number the frames of an AVI file; use reader decord or pyav")


def end_of_edit_list(path: str) -> float:
    """Return the time in seconds at which the video of an mp4 or mov file ends, infinite where no edit list trims it.

    Raises `Broken` for lists of several edits, which skip or repeat frames in the middle.
    """
    with open(path, "rb") as file:
        if file.read(8)[4:] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return math.inf
        file.seek(0)
        movie = next((file.read(size) for kind, size in _boxes_of(file) if kind == b"moov"), b"")
    header = _box(movie, b"mvhd")
    for kind, track in _boxes(movie):
        if kind != b"trak" or _box(track, b"mdia", b"hdlr")[8:12] != b"vide":
            continue
        edits = _box(track, b"edts", b"elst")
        if len(header) < 24 or len(edits) < 8:
            return math.inf
        scale = struct.unpack_from(">I", header, 20 if header[0] else 12)[0]
        entry = struct.Struct(">qqi" if edits[0] else ">Iii")
        count = min(struct.unpack_from(">I", edits, 4)[0], (len(edits) - 8) // entry.size)
        found = [entry.unpack_from(edits, 8 + index * entry.size)[:2] for index in range(count)]
        shown = [duration for duration, start in found if start >= 0]
        if len(shown) > 1:
            raise Broken("its edit list joins several parts; use reader pyav, or re-encode the clip")
        if not shown or not shown[0] or not scale:  # no duration: a fragmented file
            return math.inf
        return sum(duration for duration, _ in found) / scale
    return math.inf


def _boxes_of(file) -> Iterator[tuple[bytes, int]]:
    """Yield kind and content size of the boxes of a file, which stands at the content meanwhile."""
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        length = 8
        if size == 1:
            size, length = int.from_bytes(file.read(8), "big"), 16
        if size < length:  # 0: to the end of the file
            yield kind, -1
            return
        following = file.tell() + size - length
        yield kind, size - length
        file.seek(following)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of the boxes inside a box."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if size < 8:
            return
        yield kind, data[at + 8 : at + size]
        at += size


def _box(data: bytes, *path: bytes) -> bytes:
    """Return the content of the first box at a path, empty if there is none."""
    for name in path:
        data = next((content for kind, content in _boxes(data) if kind == name), b"")
    return data
