"""A checkpoint run over a file by any number of processes: what is left to do, batches of it through the model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.contrib.logging import logging_redirect_tqdm

from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.sample.media import MediaReader
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.data.video.reader import MediaInfo
from swim_fast.evaluation.predictions import Predictions, file_state, model_state
from swim_fast.inference.loading import Checkpoint, choose_inference, choose_sampling, find_run, load_checkpoint
from swim_fast.jobs import Evaluation
from swim_fast.options import Decoding, Sampling, Supervision
from swim_fast.progress_bar import ProgressBar

logger = logging.getLogger(__name__)

T = TypeVar("T")

Batch = Sequence[tuple[int, Sample]]  # record indices and samples

# A rank may have long clips where another has short ones, and waits for it at the end.
_PATIENCE = timedelta(days=7)
_SAMPLING = (*Sampling.model_fields, "reader")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run: its rank, their number, and the device of its model."""

    rank: int
    size: int
    device: str

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """Return this rank's part."""
        return things[self.rank :: self.size]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            torch.distributed.barrier()


@contextlib.contextmanager
def running_ranks() -> Iterator[Ranks]:
    """Connect the ranks that torchrun started while the block runs; a single one without torchrun.

    Results travel by files in a folder that all ranks see, so that gloo does on GPUs too.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)  # Triton launches on the current device
    if size == 1:
        yield Ranks(0, 1, device)
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, size, device)
    finally:
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Work:
    """Functions that predict records, once a model is loaded.

    Attributes:
        build: makes the sample of a record; its DataErrors are kept as problems, never as predictions.
        predict: returns what is kept of each record of a batch.
    """

    build: Callable[[int], Sample]
    predict: Callable[[Batch], list[dict[str, Any]]]


class Run:
    """A checkpoint run over a file.

    Args:
        options: model, file and sampling; what they do not say of the sampling and of position ids is that of
            the run that made the model.
        ranks: the processes of the run.

    Attributes:
        records: the file.
        indices: the records that are meant.
        trained: configuration of the run that made the model; None if unknown.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, options: Evaluation, ranks: Ranks):
        self.options, self.ranks = options, ranks
        self.records = RecordFile(options.file, options.media)
        self.indices = range(len(self.records) if options.limit is None else min(options.limit, len(self.records)))
        self.trained = find_run(options)
        self.sampling, self.decoding = choose_sampling(options, self.trained)
        self.inference = choose_inference(options, self.trained)

    def load(self) -> Checkpoint:
        """Load the model and its processor onto the rank's device."""
        return load_checkpoint(self.options.model, self.inference, self.ranks.device)

    def sample_builder(self, processor: Any, **changes: Any) -> SampleBuilder:
        """Return what makes samples of records; `changes` are fields of `Supervision`."""
        builder = SampleBuilder(processor, self.sampling, self.decoding, Supervision(**changes))
        builder.reader = _WithFolders(self.decoding, self.options.folder_fps)
        return builder

    def settings(self, kind: str, **more: Any) -> dict[str, Any]:
        """Return what predictions depend on; not the size of the batches, which changes no more than the last bits."""
        options = self.options
        return {
            "evaluation": kind,
            "model": options.model,
            "weights": model_state(options.model),
            "file": Path(options.file).name,
            "contents": file_state(options.file),
            **self.sampling.model_dump(),
            "reader": self.decoding.reader,
            "folder_fps": options.folder_fps,
            "dtype": options.dtype,
            "attention": options.attention,
            "position_ids": self.inference.position_ids,
            **more,
        }

    def predict(
        self, indices: Sequence[int], settings: dict[str, Any], prepare: Callable[[], Work] | None, desc: str
    ) -> dict[int, dict[str, Any]] | None:
        """Predict the records that have no prediction yet, each rank its share.

        Args:
            indices: the records that are meant.
            settings: everything that predictions depend on.
            prepare: loads the model; called if anything is left to do. None: take what there is.
            desc: label of the progress bar.

        Returns:
            The predictions and problems by record index, on the first rank; None on the others.

        Raises:
            PredictionsError: the folder holds predictions made with other settings.
            CheckpointError: the model cannot be loaded.
        """
        with Predictions(Path(self.options.out), settings) as predictions:
            rest = [index for index in indices if index not in predictions.done]
            if rest and prepare is not None:
                work = prepare()
                self.ranks.wait()  # all have read what there is before any adds to it
                predictions.open(self.ranks.rank)
                if self.ranks.rank == 0:
                    taken = ", ".join(f"{name} {settings[name]}" for name in _SAMPLING if settings[name] is not None)
                    logger.info("sampling: %s", taken)
                    if predictions.done:
                        logger.info("%d predictions are there already", len(predictions.done))
                self._predict(self.ranks.share(rest), work, predictions, desc)
                predictions.close()
                self.ranks.wait()
            return None if self.ranks.rank else predictions.entries()

    def _predict(self, indices: Sequence[int], work: Work, predictions: Predictions, desc: str) -> None:
        options = self.options
        loader = DataLoader(
            _Samples(indices, work.build),
            options.batch_size,
            num_workers=options.workers,
            collate_fn=list,
            multiprocessing_context="fork" if options.workers else None,  # `build` need not be picklable
        )
        hidden = self.ranks.rank > 0
        with logging_redirect_tqdm(), ProgressBar(total=len(indices), desc=desc, unit="record", disable=hidden) as bar:
            for batch in loader:
                good = []
                for index, sample in batch:
                    if isinstance(sample, DataError):
                        logger.warning("left out: %s", sample)
                        predictions.add(index, {"problem": str(sample)})
                    else:
                        good.append((index, sample))
                if good:
                    for (index, _), entry in zip(good, work.predict(good), strict=True):
                        predictions.add(index, entry)
                bar.update(len(batch))


class _WithFolders(MediaReader):
    """Knows the frame rate of folders of frames."""

    def __init__(self, decoding: Decoding, folder_fps: float):
        super().__init__(decoding)
        self._folder_fps = folder_fps

    def info(self, record: Record) -> MediaInfo:
        info = super().info(record)
        return dataclasses.replace(info, fps=self._folder_fps) if record.media.is_dir() else info


class _Samples(Dataset):
    """Record indices with their samples, or with what is wrong with them."""

    def __init__(self, indices: Sequence[int], build: Callable[[int], Sample]):
        self._indices, self._build = indices, build

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> tuple[int, Sample | DataError]:
        index = self._indices[position]
        try:
            return index, self._build(index)
        except DataError as error:
            return index, error
