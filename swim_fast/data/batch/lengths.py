"""Token counts of all samples, found without decoding the videos and kept on disk.

A length is exactly that of the sample which `SampleBuilder` builds: conversation, tokenizer, choice of frames and the
processor's rule for their size are the same code. It costs opening each clip once. The lengths of a file are kept under
its path, size and time of change, its media folder, the options (its own, too) and the processor; a clip that is
replaced under its name is not noticed. Records that could not be measured are tried again each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.data.source.cache import cache_folder, file_key, load_array, save_array
from swim_fast.data.source.errors import DataError

FORMAT = 1
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
    found = [None]
    if distributed.get_rank() == 0:
        # None says "still at work", so that nobody waits in one collective until it times out.
        found = [_lengths(dataset, items, workers, lambda: distributed.broadcast_object_list([None]))]
        distributed.broadcast_object_list(found)
    while found[0] is None:
        distributed.broadcast_object_list(found)
    return found[0]


def _lengths(dataset: SwimDataset, items: np.ndarray, workers: int | None, at_work: Callable[[], None]) -> np.ndarray:
    """Return the lengths of some items; calls `at_work` about once a minute."""
    from tqdm import tqdm

    kept = [_KeptLengths(dataset, source) for source in range(len(dataset.sources))]
    known = np.concatenate([lengths.load() for lengths in kept])
    missing = np.unique(items[known[items] <= _BAD])

    def save() -> None:
        for lengths, part in zip(kept, np.split(known, np.cumsum(dataset.lengths)[:-1]), strict=True):
            lengths.save(part)

    if len(missing):
        workers = _cores() if workers is None else workers
        loader = DataLoader(
            _Measured(dataset, missing),
            batch_size=CHUNK,
            num_workers=min(workers, len(missing) // CHUNK),
            collate_fn=list,
        )
        done, due = 0, time.monotonic() + SAVE_SECONDS
        with tqdm(total=len(missing), desc="measuring samples", unit="record", disable=None) as bar:
            for chunk in loader:
                known[missing[done : done + len(chunk)]] = chunk
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

    def __getitem__(self, index: int) -> int:
        source, record = self.dataset.locate(int(self.items[index]))
        try:
            return self.dataset.builders[source].length(self.dataset.files[source][record])
        except DataError:
            return _BAD


class _KeptLengths:
    """Lengths of one source as kept on disk, int64 [records]: -1 where there is none."""

    def __init__(self, dataset: SwimDataset, source: int):
        path = Path(dataset.sources[source].path)
        self._records, self._used = len(dataset.files[source]), dataset.lengths[source]
        self._file, self._version = file_key(path)
        records = dataset.files[source]
        about = [str(Path(records.media_root).resolve()), records.excerpt.model_dump()]
        settings = [FORMAT, *about, *_settings(dataset.builders[source])]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:20]
        self._folder = cache_folder("lengths")
        self._path = self._folder / f"{self._file}-{self._version}-{digest}.npy"

    def _load(self) -> np.ndarray:
        lengths = load_array(self._path)
        if lengths is None or lengths.dtype != np.int64 or lengths.shape != (self._records,):
            return np.full(self._records, _UNKNOWN)
        return lengths

    def load(self) -> np.ndarray:
        """Return the lengths of the records that the source uses."""
        return self._load()[: self._used]

    def save(self, lengths: np.ndarray) -> None:
        """Keep the lengths of the records that the source uses, beside those of others."""
        everything = self._load()
        everything[: self._used] = np.where(lengths == _UNKNOWN, everything[: self._used], lengths)
        try:
            save_array(self._path, everything)
            for outdated in self._folder.glob(f"{self._file}-*.npy"):
                if not outdated.name.startswith(f"{self._file}-{self._version}-"):
                    outdated.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the lengths of samples are not kept (%s); set SWIM_FAST_CACHE to a writable folder", error)


def _settings(builder) -> list:
    """Return everything that lengths depend on beside the file."""
    from transformers import __version__

    processor = builder.encode.processor
    return [
        builder.sampling.model_dump(),
        builder.reader.name,
        processor.image_processor.to_dict(),
        processor.video_processor.to_dict(),
        processor.chat_template,
        hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        __version__,
    ]
