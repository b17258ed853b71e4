"""Token counts of all samples, found without decoding the videos and kept on disk.

A length is exactly that of the sample which `SampleBuilder` builds: conversation, tokenizer, choice of frames and the
processor's rule for their size are the same code. (VideoLLaMA3 leaves out tokens by what the frames show: there it is
the most that there can be, and packed batches have room left.) It costs opening each clip once. The lengths of a file
are kept under its path, size and time of change, its media folder, the options (its own, too) and the processor. Those
of a clip whose size or time of change is another one are measured anew, as are lengths that cannot be true, and records
that could not be measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.data.source.cache import cache_folder, file_key, load_arrays, save_arrays
from swim_fast.data.source.errors import DataError

FORMAT = 2
MAX_LENGTH = 1 << 27  # tokens; no sample has as many
STAT_THREADS = 16  # a network disk answers many questions at a time
CHUNK = 32  # records that a worker process answers together
SAVE_SECONDS = 60.0
_UNKNOWN, _BAD = -1, 0

logger = logging.getLogger(__name__)


def sample_lengths(dataset: SwimDataset, workers: int | None = None, limit: int | None = None) -> np.ndarray:
    """Return the number of tokens of each sample of a dataset whose builder is a `SampleBuilder`.

    Where several ranks run, all of them call it: rank 0 measures, the others wait and get the result.

    Args:
        dataset: the samples.
        workers: processes; None: as many as this one may use cores. A few records are measured in this one.
        limit: measure only so many samples, evenly spread over the dataset; None: all.

    Returns:
        int64 [len(dataset)], or [limit] if that is less: 0 for a record that cannot become a sample. The number of
        those is logged.

    Raises:
        MissingLibraryError: the video reader is not installed.
    """
    items = np.arange(len(dataset))
    if limit is not None and limit < len(items):
        items = np.round(np.linspace(0, len(items) - 1, limit)).astype(np.int64)
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return _lengths(dataset, items, workers, lambda: None)
    found: list[np.ndarray | None] = [None]
    if distributed.get_rank() == 0:
        # None says "still at work", so that nobody waits in one collective until it times out.
        found = [_lengths(dataset, items, workers, lambda: distributed.broadcast_object_list([None]))]
        distributed.broadcast_object_list(found)
    while found[0] is None:
        distributed.broadcast_object_list(found)
    return found[0]


def _lengths(dataset: SwimDataset, items: np.ndarray, workers: int | None, at_work: Callable[[], None]) -> np.ndarray:
    """Return the lengths of some items; calls `at_work` about once a minute."""
    from swim_fast.progress_bar import ProgressBar

    kept = [_KeptLengths(dataset, source) for source in range(len(dataset.sources))]
    known = np.concatenate([lengths.load() for lengths in kept])
    clips: dict[int, str] = {}  # of the items that are measured now
    missing = np.unique(items[known[items] <= _BAD])

    def save() -> None:
        first = 0
        for lengths, part in zip(kept, np.split(known, np.cumsum(dataset.lengths)[:-1]), strict=True):
            lengths.save(part, {i: clips[first + i] for i in range(len(part)) if first + i in clips})
            first += len(part)

    if len(missing):
        workers = _cores() if workers is None else workers
        loader = DataLoader(
            _Measured(dataset, missing),
            batch_size=CHUNK,
            num_workers=min(workers, len(missing) // CHUNK),
            collate_fn=list,
        )
        done, due = 0, time.monotonic() + SAVE_SECONDS
        with ProgressBar(total=len(missing), desc="measuring samples", unit="record") as bar:
            for chunk in loader:
                now = missing[done : done + len(chunk)]
                known[now] = [length for length, _ in chunk]
                clips.update((item, clip) for item, (_, clip) in zip(now.tolist(), chunk, strict=True))
                done += len(chunk)
                bar.update(len(chunk))
                if time.monotonic() > due:
                    save()
                    at_work()
                    due = time.monotonic() + SAVE_SECONDS
        dataset.builder.reader.close()
        save()
    bad = int((known[items] == _BAD).sum())
    if bad:
        logger.warning(
            "%d of %d records cannot be used and have no length; training reports each of them, and so does "
            "`swim-fast data check`",
            bad,
            len(items),
        )
    return known[items]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Measured(Dataset):
    """Lengths of the items `items` of a dataset; works in worker processes."""

    def __init__(self, dataset: SwimDataset, items: np.ndarray):
        self.dataset, self.items = dataset, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, str]:
        """Return the length of an item, and the path of its clip, "" if it has none."""
        source, number = self.dataset.locate(int(self.items[index]))
        try:
            record = self.dataset.files[source][number]
            path = os.path.abspath(record.media) if record.media else ""
            return self.dataset.builders[source].length(record), path
        except DataError:
            return _BAD, ""


class _KeptLengths:
    """Lengths of one source as kept on disk, with the clip of each and that one's size and time of change."""

    def __init__(self, dataset: SwimDataset, source: int):
        path = Path(dataset.sources[source].path)
        self._records, self._used = len(dataset.files[source]), dataset.lengths[source]
        self._limit = dataset.builders[source].sampling.max_tokens or MAX_LENGTH
        self._file, self._version = file_key(path)
        records = dataset.files[source]
        about = [str(Path(records.media_root).resolve()), records.excerpt.model_dump()]
        settings = [FORMAT, *about, *_settings(dataset.builders[source])]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:20]
        self._folder = cache_folder("lengths")
        self._path = self._folder / f"{self._file}-{self._version}-{digest}.npz"
        self._lengths = np.full(self._records, _UNKNOWN, np.int64)
        self._clips = np.full(self._records, -1, np.int32)  # index of the record's clip; -1: none
        self._paths: list[str] = []
        self._stamps = np.empty((0, 2), np.int64)  # of each clip: size and time of change

    def load(self) -> np.ndarray:
        """Return the lengths of the records that the source uses, int64; -1 where there is none."""
        found = load_arrays(self._path)
        kinds = {"lengths": np.int64, "clips": np.int32, "paths": np.uint8, "stamps": np.int64}
        if found is None or {name: array.dtype for name, array in found.items()} != kinds:
            return self._lengths[: self._used].copy()
        paths = [os.fsdecode(path) for path in found["paths"].tobytes().split(b"\0")[:-1]]
        shapes = [found[name].shape for name in ("lengths", "clips", "stamps")]
        if shapes != [(self._records,), (self._records,), (len(paths), 2)]:
            return self._lengths[: self._used].copy()
        lengths, clips = found["lengths"], found["clips"]
        sound = (lengths >= _BAD) & (lengths <= self._limit) & (clips >= -1) & (clips < len(paths))
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            now = np.array(list(threads.map(_stamp, paths)), np.int64).reshape(-1, 2)
        same = np.append((now == found["stamps"]).all(axis=1), True)  # the last one: no clip
        sound &= same[np.where(sound, clips, -1)]
        self._lengths, self._clips = np.where(sound, lengths, _UNKNOWN), np.where(sound, clips, -1).astype(np.int32)
        self._paths, self._stamps = paths, found["stamps"]
        return self._lengths[: self._used].copy()

    def save(self, lengths: np.ndarray, clips: dict[int, str]) -> None:
        """Keep the lengths of the records that the source uses, beside those of others.

        Args:
            lengths: int64 [records that are used].
            clips: path of the clip of each record that was measured since, "" for none.
        """
        index = {path: number for number, path in enumerate(self._paths)}
        new = [path for path in dict.fromkeys(clips.values()) if path and path not in index]
        again = sorted({index[path] for path in clips.values() if path in index})
        self._lengths[: self._used] = np.where(lengths == _UNKNOWN, self._lengths[: self._used], lengths)
        self._stamps = np.concatenate((self._stamps, np.array([*map(_stamp, new)], np.int64).reshape(-1, 2)))
        self._stamps[again] = np.array([_stamp(self._paths[number]) for number in again], np.int64).reshape(-1, 2)
        self._paths += new
        index = {"": -1, **{path: number for number, path in enumerate(self._paths)}}
        for record, path in clips.items():
            self._clips[record] = index[path]
        paths = b"".join(os.fsencode(path) + b"\0" for path in self._paths)
        arrays = {"lengths": self._lengths, "clips": self._clips, "stamps": self._stamps}
        try:
            save_arrays(self._path, paths=np.frombuffer(paths, np.uint8), **arrays)
            for outdated in self._folder.glob(f"{self._file}-*.np[yz]"):
                if not outdated.name.startswith(f"{self._file}-{self._version}-"):
                    outdated.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the lengths of samples are not kept (%s); set SWIM_FAST_CACHE to a writable folder", error)


def _stamp(path: str) -> tuple[int, int]:
    """Return the size and time of change of a file or folder; -1 where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _settings(builder) -> list:
    """Return everything that lengths depend on beside the file."""
    from transformers import __version__

    processor = builder.encode.processor
    return [
        builder.sampling.model_dump(),
        builder.reader.name,
        processor.to_dict(),  # its image and video processor, too
        processor.chat_template,
        hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        __version__,
    ]
