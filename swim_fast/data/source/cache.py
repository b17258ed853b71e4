"""Arrays that took long to find, kept on disk in `$SWIM_FAST_CACHE`, by default `~/.cache/swim_fast`."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from swim_fast.files import atomic_write


def cache_folder(kind: str) -> Path:
    """Return the folder for arrays of one kind; it need not exist yet."""
    return Path(os.environ.get("SWIM_FAST_CACHE") or Path.home() / ".cache" / "swim_fast") / kind


def file_key(path: Path) -> tuple[str, str]:
    """Return two parts of a file name: one for a file's path, one that changes with its contents.

    Raises:
        OSError: there is no such file.
    """
    stat = path.stat()
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:20], f"{stat.st_size}-{stat.st_mtime_ns}"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array so that other processes see all of it or none; any number may do so at the same time.

    Raises:
        FileError: the folder cannot be made or written to.
    """
    with atomic_write(path, "wb") as file:
        np.save(file, array)


def load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray | None:
    """Return the array, or None where there is none or it is damaged."""
    try:
        return np.load(path, mmap_mode=mmap_mode)
    except (OSError, ValueError, EOFError):
        return None


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write several arrays as `save_array` writes one, each with its checksum.

    Raises:
        FileError: the folder cannot be made or written to.
    """
    with atomic_write(path, "wb") as file:
        np.savez(file, **arrays)


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays by name, or None where there are none or any is damaged."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error):
        return None
