"""What all evaluations share: options, which records are left to do, batches of them through the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from swim_fast.data.sample.builder import MediaReader, Sample, SampleBuilder, SampleOptions
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record
from swim_fast.data.video.reader import MediaInfo
from swim_fast.evaluation.predictions import Predictions, file_state, model_state
from swim_fast.evaluation.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How a model is run over a file.

    Attributes:
        model: checkpoint folder or name on the Hugging Face hub.
        file: JSON list or JSONL of records.
        out: folder for predictions, results and tables.
        media: folder that media paths are relative to; None: the file's own.
        limit: only so many records, from the first; None for all.
        max_frames, max_pixels, reader, decode_timeout: as in `SampleOptions`.
        folder_fps: frames per second of clips that are folders of frames, which do not say; 1 is what training takes.
        batch_size: samples at a time.
        dtype, attention: as for `load_model`.
        workers: processes that decode clips, for each rank; 0 decodes between the batches.

    Raises:
        ValueError: for a value outside its range.
    """

    model: str
    file: str
    out: Path
    media: str | None = None
    limit: int | None = None
    max_frames: int = 32
    max_pixels: int | None = None
    folder_fps: float = 1.0
    batch_size: int = 4
    dtype: str = "auto"
    attention: str = "sdpa"
    reader: str = "decord"
    decode_timeout: float = 60.0
    workers: int = 2

    def __post_init__(self):
        for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        if not 0 < self.folder_fps < float("inf"):
            raise ValueError(f"--folder-fps is {self.folder_fps}; it must be positive")
        self._sample_options()

    def sample_builder(self, processor: Any, **changes: Any) -> SampleBuilder:
        """Makes samples of records; ``changes`` are other fields of `SampleOptions`."""
        builder = SampleBuilder(processor, self._sample_options(**changes))
        builder.reader = _WithFolders(self.reader, self.decode_timeout, self.folder_fps)
        return builder

    def _sample_options(self, **changes: Any) -> SampleOptions:
        return SampleOptions(
            max_frames=self.max_frames,
            max_pixels=self.max_pixels,
            reader=self.reader,
            decode_timeout=self.decode_timeout,
            **changes,
        )

    def settings(self, kind: str, **more: Any) -> dict[str, Any]:
        """What predictions depend on. The size of the batches is left out: it changes no more than the last bits."""
        return {
            "evaluation": kind,
            "model": self.model,
            "weights": model_state(self.model),
            "file": Path(self.file).name,
            "contents": file_state(self.file),
            "max_frames": self.max_frames,
            "max_pixels": self.max_pixels,
            "folder_fps": self.folder_fps,
            "dtype": self.dtype,
            "attention": self.attention,
            "reader": self.reader,
            **more,
        }

    def count(self, records: int) -> int:
        """How many of a file's records are meant."""
        return records if self.limit is None else min(self.limit, records)


class _WithFolders(MediaReader):
    """Knows the frame rate of folders of frames."""

    def __init__(self, reader: str, timeout: float, folder_fps: float):
        super().__init__(reader, timeout)
        self._folder_fps = folder_fps

    def info(self, record: Record) -> MediaInfo:
        info = super().info(record)
        return replace(info, fps=self._folder_fps) if record.media.is_dir() else info


class _Samples:
    """Map-style dataset of numbers and samples, or of what is wrong with them."""

    def __init__(self, numbers: Sequence[int], build: Callable[[int], Sample]):
        self._numbers, self._build = numbers, build

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> tuple[int, Sample | DataError]:
        number = self._numbers[place]
        try:
            return number, self._build(number)
        except DataError as error:
            return number, error


def predict_rest(
    numbers: Sequence[int],
    build: Callable[[int], Sample],
    predict: Callable[[list[tuple[int, Sample]]], list[dict[str, Any]]],
    predictions: Predictions,
    options: RunOptions,
    ranks: Ranks,
    desc: str,
) -> None:
    """Predict the records that have no prediction yet: this rank its share. Returns when all ranks are done.

    Args:
        numbers: of the records that are meant.
        build: makes the sample of a record; its DataErrors are kept as problems, never as predictions.
        predict: of a batch of record numbers and samples, what is kept of each.
        predictions: made by every rank, not yet open.
        options, ranks: how and where.
        desc: what the progress bar says.
    """
    from torch.utils.data import DataLoader

    rest = ranks.share([number for number in numbers if number not in predictions.done])
    ranks.wait()  # all have read what there is before any adds to it
    predictions.open(ranks.rank)
    loader = DataLoader(
        _Samples(rest, build),
        options.batch_size,
        num_workers=options.workers,
        collate_fn=list,
        multiprocessing_context="fork" if options.workers else None,  # `build` need not be picklable
    )
    if ranks.rank == 0 and predictions.done:
        logger.info("%d predictions are there already", len(predictions.done))
    with logging_redirect_tqdm(), tqdm(total=len(rest), desc=desc, unit="record", disable=ranks.rank > 0) as bar:
        for batch in loader:
            good = []
            for number, sample in batch:
                if isinstance(sample, DataError):
                    logger.warning("left out: %s", sample)
                    predictions.add(number, {"problem": str(sample)})
                else:
                    good.append((number, sample))
            if good:
                for (number, _), entry in zip(good, predict(good), strict=True):
                    predictions.add(number, entry)
            bar.update(len(batch))
    predictions.close()
    ranks.wait()
