"""Offsets of the records of a JSON list or JSONL file, found once and kept on disk for large files.

The scan goes over the bytes with numpy, some hundred MB a second, and parses nothing: a malformed record costs that
record alone. The index of a file above 32 MB is kept in `$SWIM_FAST_CACHE`, by default `~/.cache/swim_fast`, under the
file's path, size and time of change.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from swim_fast.data.source.cache import cache_folder, file_key, load_array, save_array
from swim_fast.data.source.errors import DataError

CACHE_FROM_BYTES = 32 << 20
PROGRESS_FROM_BYTES = 256 << 20
CHUNK_BYTES = 1 << 20  # what fits into a processor's cache is scanned several times as fast
FORMAT = 1

_WHITE = b" \t\r\n"
_QUOTE, _BACKSLASH, _NEWLINE, _BRACE, _CLOSING_BRACE = (ord(character) for character in '"\\\n{}')
_AFTER_STRING = np.zeros(256, bool)
_AFTER_STRING[list(b"]},:" + _WHITE)] = True

logger = logging.getLogger(__name__)


def record_offsets(path: Path) -> np.ndarray:
    """Return first byte and end of every record of a file, int64 [records, 2]; a read-only memory map for large files.

    Raises:
        DataError: the file is missing, empty, or neither a JSON list nor JSON lines.
    """
    try:
        size = path.stat().st_size
        file_id, version = file_key(path)
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}", source=str(path)) from None
    if size < CACHE_FROM_BYTES:
        return _scan(path)
    folder = cache_folder("records")
    cached = folder / f"{file_id}-{version}-v{FORMAT}.npy"
    offsets = _load(cached, size)
    if offsets is not None:
        return offsets
    offsets = _scan(path)
    try:
        save_array(cached, offsets)
        for outdated in folder.glob(f"{file_id}-*.npy"):
            if outdated != cached:
                outdated.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the index of %s is not kept (%s); set SWIM_FAST_CACHE to a writable folder", path, error)
        return offsets
    loaded = _load(cached, size)
    return offsets if loaded is None else loaded


def _load(cached: Path, size: int) -> np.ndarray | None:
    """Return the stored index, or None where there is none or it is damaged."""
    offsets = load_array(cached, mmap_mode="r")
    sound = offsets is not None and offsets.dtype == np.int64 and offsets.ndim == 2 and offsets.shape[1] == 2
    return offsets if sound and (not len(offsets) or 0 <= offsets[0, 0] < offsets[-1, 1] <= size) else None


def _scan(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise DataError("is empty", source=str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            head = text[:4]
            if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in head and head.strip(b"\0")):
                raise DataError("is not UTF-8 (it looks like UTF-16 or UTF-32); save it as UTF-8", source=str(path))
            start = 3 if head[:3] == b"\xef\xbb\xbf" else 0
            first = re.compile(rb"[^ \t\r\n]").search(text, start)
            if first is None:
                raise DataError("holds nothing but white space", source=str(path))
            if first.group() == b"[" and not _is_lines_of_lists(text, start, path):
                return _scan_list(text, first.start(), path)
            return _scan_lines(text, start, path)


def _is_lines_of_lists(text: mmap.mmap, start: int, path: Path) -> bool:
    """Tell a .jsonl file with a list in its first line from one that is a single list."""
    end = text.find(b"\n", start)
    if path.suffix.lower() not in (".jsonl", ".ndjson") or end < 0 or not text[end : end + 4096].strip():
        return False
    return _parses(text[start:end])


def _parses(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _chunks(text: mmap.mmap, start: int, path: Path) -> Iterator[tuple[int, int]]:
    """Yield successive ranges of the file, none of which ends in a backslash, under a progress bar for large files."""
    from swim_fast.progress_bar import ProgressBar

    hidden = len(text) < PROGRESS_FROM_BYTES or os.environ.get("LOCAL_RANK", "0") != "0"  # of several ranks one draws
    with ProgressBar(total=len(text), unit="B", unit_scale=True, desc=f"indexing {path.name}", disable=hidden) as bar:
        while start < len(text):
            end = min(start + CHUNK_BYTES, len(text))
            while end < len(text) and text[end - 1] == _BACKSLASH:
                end += 1
            yield start, end
            bar.update(end - bar.n)
            start = end


def _scan_lines(text: mmap.mmap, start: int, path: Path) -> np.ndarray:
    newlines = [
        np.flatnonzero(np.frombuffer(text, np.uint8, end - begin, begin) == _NEWLINE) + begin
        for begin, end in _chunks(text, start, path)
    ]
    ends = np.concatenate([*newlines, [len(text)]])
    lines = np.stack((np.concatenate(([start], ends[:-1] + 1)), ends), axis=1)
    lines = lines[lines[:, 0] < lines[:, 1]]
    objects = np.frombuffer(text, np.uint8)[lines[:, 0]] == _BRACE
    kept = objects.copy()
    for index in np.flatnonzero(~objects):
        line = text[slice(*lines[index])].strip()
        kept[index] = bool(line)
        objects[index] = line.startswith(b"{")
    if not objects.any():
        raise DataError("is neither a JSON list nor JSON lines: no line begins with {", source=str(path))
    lines = lines[kept]
    if len(lines) > 1 and text[slice(*lines[-1])].strip() == b"}" and not _parses(text[slice(*lines[0])]):
        raise DataError(
            "holds one JSON object over several lines; give a list of records in [ ], or one record a line",
            source=str(path),
        )
    return lines


def _scan_list(text: mmap.mmap, start: int, path: Path) -> np.ndarray:
    """Find the records of a JSON list: everything between brackets of depth 2, and whatever else is between commas."""
    begins, ends, root_end = [], [], None
    depth, inside = 0, False  # at the beginning of the chunk: open brackets; whether within a string
    for first, last in _chunks(text, start, path):
        if root_end is not None:
            sound = not text[first:last].strip()
        else:
            sound, quotes, brackets, steps = _punctuation(text, first, last, inside)
            depths = depth + np.cumsum(steps, dtype=np.int64)
            begins.append(brackets[(steps > 0) & (depths == 2)])
            ends.append(brackets[(steps < 0) & (depths == 1)] + 1)
            closed = np.flatnonzero(depths <= 0)
            if len(closed):
                root_end = int(brackets[closed[0]])
                sound = sound and len(closed) == 1 and not text[root_end + 1 : last].strip()
            inside ^= bool(quotes % 2)
            depth = int(depths[-1]) if len(depths) else depth
        if not sound:
            root_end = None
            break
    if root_end is None:
        return _recover_list(text, start, path)
    offsets = np.stack((np.concatenate(begins), np.concatenate(ends)), axis=1)
    return _with_stray_values(text, offsets, start + 1, root_end)


def _punctuation(text: mmap.mmap, first: int, last: int, inside: bool) -> tuple[bool, int, np.ndarray, np.ndarray]:
    """Find the punctuation of a range of the file that begins inside or outside a string.

    Returns:
        True where its strings look sound; the number of quotation marks; offsets and steps (1 opens, -1 closes) of the
        brackets outside strings.
    """
    everything = np.frombuffer(text, np.uint8)
    chunk = everything[first:last]
    quotes = _real_quotes(chunk)
    newlines = np.flatnonzero(chunk == _NEWLINE)
    # A lost quote turns strings inside out: then text stands where JSON wants its punctuation.
    after = np.minimum(quotes[1 - inside :: 2] + first + 1, len(text) - 1)
    sound = _AFTER_STRING[everything[after]].all() and not ((np.searchsorted(quotes, newlines) + inside) % 2).any()
    folded = chunk | 0x20  # turns [ and ] into { and }, and nothing else into them
    brackets = np.flatnonzero((folded == _BRACE) | (folded == _CLOSING_BRACE))
    brackets = brackets[(np.searchsorted(quotes, brackets) + inside) % 2 == 0]
    return bool(sound), len(quotes), brackets + first, np.where(folded[brackets] == _BRACE, 1, -1)


def _real_quotes(chunk: np.ndarray) -> np.ndarray:
    """Find the quotation marks that begin or end a string: those after an even number of backslashes."""
    quotes = np.flatnonzero(chunk == _QUOTE)
    after = quotes[(quotes > 0) & (chunk[quotes - 1] == _BACKSLASH)]
    if not len(after):
        return quotes
    slashes = np.flatnonzero(chunk == _BACKSLASH)
    run_begins = np.concatenate(([True], np.diff(slashes) > 1))
    run_start = np.maximum.accumulate(np.where(run_begins, slashes, 0))
    odd = (slashes - run_start) % 2 == 0  # this backslash is the first, third … of its run
    return np.setdiff1d(quotes, after[odd[np.searchsorted(slashes, after - 1)]], assume_unique=True)


def _with_stray_values(text: mmap.mmap, offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """Add list elements that are no objects (numbers, null …): they are records too, if useless ones."""
    stray = []
    edges = zip([start, *offsets[:, 1].tolist()], [*offsets[:, 0].tolist(), end], strict=True)
    for left, right in edges:
        gap = text[left:right]
        if gap.strip(b", \t\r\n"):
            for piece in re.finditer(rb"[^,]+", gap):
                if piece.group().strip():
                    stray.append((left + piece.start(), left + piece.end()))
    if not stray:
        return offsets
    offsets = np.concatenate((offsets, np.array(stray, np.int64)))
    return offsets[np.argsort(offsets[:, 0])]


def _recover_list(text: mmap.mmap, start: int, path: Path) -> np.ndarray:
    """Find the records of a list that is not valid JSON: split where an object begins with the first one's key.

    A piece that parses is a record; another one is grown by its successors while it merely ends too early (an inner
    object began with that key), and else is a malformed record.
    """
    key = re.compile(rb'\[\s*\{\s*("(?:[^"\\]|\\.)*")\s*:').match(text, start)
    if key is None:
        raise DataError("begins like a JSON list but is none, and not of records at that", source=str(path))
    landmark = re.compile(rb"\{\s*" + re.escape(key.group(1)) + rb"\s*:")
    begins = [match.start() for match in landmark.finditer(text, start)]
    ends = [*begins[1:], len(text)]
    offsets, malformed, index = [], 0, 0
    while index < len(begins):
        step = _count_pieces(text, begins, ends, index)
        malformed += step is None
        step = step or 1
        piece = text[begins[index] : ends[index + step - 1]]
        offsets.append((begins[index], begins[index] + len(_trimmed(piece, index + step == len(begins)))))
        index += step
    logger.warning("%s is not valid JSON: %d of its %d records are malformed", path, malformed, len(offsets))
    return np.array(offsets, np.int64)


def _trimmed(piece: bytes, is_last: bool) -> bytes:
    piece = piece.rstrip(b", \t\r\n")
    return piece.removesuffix(b"]").rstrip() if is_last and not _parses(piece) else piece


def _count_pieces(text: mmap.mmap, begins: list[int], ends: list[int], index: int) -> int | None:
    """Return the number of pieces, from one on, that make one record; None if it is malformed."""
    for step in range(1, min(64, len(begins) - index) + 1):
        piece = _trimmed(text[begins[index] : ends[index + step - 1]], index + step == len(begins))
        try:
            json.loads(piece)
            return step
        except json.JSONDecodeError as error:
            if error.pos < len(error.doc) and not error.msg.startswith("Unterminated"):
                return None
        except (ValueError, RecursionError):
            return None
    return None
