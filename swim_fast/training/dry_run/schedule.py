"""Samples, batches and steps of a run, measured on its data without decoding videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swim_fast.config import ConfigError, RunConfig

RECORDS_READ = 200  # of each source, for their masks


@dataclass(frozen=True)
class Lengths:
    """Tokens of the samples of one source: int64, 0 for a record with a problem."""

    name: str
    measured: np.ndarray
    records: int
    weight: float

    @property
    def usable(self) -> np.ndarray:
        return self.measured[self.measured > 0]


@dataclass(frozen=True)
class Schedule:
    """Steps of a run, and the batches of one GPU."""

    samples: int  # of an epoch
    steps_per_epoch: int
    steps: int
    samples_per_step: float
    batches: np.ndarray  # tokens of each, padding included


@dataclass(frozen=True)
class Supervision:
    """Largest number of tagged nouns, and of mask pixels, in the records that were read."""

    objects: int = 0
    mask_pixels: int = 0


def measure_lengths(config: RunConfig, processor, limit: int):
    """Return the dataset, and for each source the lengths of its share of `limit` records.

    Raises:
        ConfigError: no record can be used.
    """
    from swim_fast.data.batch.dataset import SwimDataset
    from swim_fast.data.batch.lengths import sample_lengths
    from swim_fast.data.sample.builder import SampleBuilder

    builder = SampleBuilder(processor, config.sampling, config.decoding)
    dataset = SwimDataset(config.data.train, builder)
    found = []
    for source, name, records in zip(config.data.train, dataset.names, dataset.lengths, strict=True):
        share = max(1, round(limit * records / max(len(dataset), 1)))
        measured = sample_lengths(SwimDataset([source], builder), limit=share)
        found.append(Lengths(name, measured, records, source.weight))
    if not any(len(source.usable) for source in found):
        raise ConfigError("no record of data.train can be used: `swim-fast data check` lists what is wrong with each")
    return dataset, found


def plan_schedule(config: RunConfig, arguments, dataset, lengths: Sequence[Lengths], gpus: int) -> Schedule:
    """Return batches and steps. Lengths of records that were not measured are drawn from those that were."""
    from swim_fast.data.batch.dataset import MixtureSampler
    from swim_fast.data.batch.packing import PackingSampler
    from swim_fast.training.arguments import get_data_seed

    random = np.random.default_rng(0)
    drawn = [
        source.measured if len(source.measured) == source.records else random.choice(source.measured, source.records)
        for source in lengths
    ]
    tokens = np.concatenate(drawn)
    order = MixtureSampler(dataset, get_data_seed(arguments))
    samples, size = len(order), arguments.per_device_train_batch_size
    accumulation = arguments.gradient_accumulation_steps
    if config.data.max_tokens_per_batch is not None:
        packing = order, tokens, config.data.max_tokens_per_batch, config.data.pack_look_ahead
        batches = np.array([tokens[batch].sum() for batch in PackingSampler(*packing)])
        epochs = 1 if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs)
        per_rank = len(PackingSampler(*packing, world_size=gpus, epochs=epochs))
        per_step = samples / per_rank * accumulation
    else:
        items = order.items(0).numpy()
        groups = [tokens[items[start : start + size]] for start in range(0, len(items), size)]
        batches = np.array([(group > 0).sum() * group.max() for group in groups])
        per_rank = math.ceil(math.ceil(samples / size) / gpus)
        per_step = size * accumulation * gpus
    steps_per_epoch = max(1, math.ceil(per_rank / accumulation))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
    return Schedule(samples, steps_per_epoch, steps, per_step, batches[batches > 0])


def measure_supervision(dataset, max_frames: int) -> Supervision:
    """Read some records of every source as they are in the file; broken ones are counted elsewhere."""
    from swim_fast.data.source.errors import DataError

    objects, pixels = 0, 0
    for file, records in zip(dataset.files, dataset.lengths, strict=True):
        for index in np.unique(np.linspace(0, records - 1, min(records, RECORDS_READ)).astype(int)).tolist():
            try:
                record = file[index]
            except DataError:
                continue
            objects = max(objects, len(record.objects))
            masks = sum(min(len(frames), max_frames) for frames in record.objects)
            pixels = max(pixels, masks * _mask_size(record))
    return Supervision(objects, pixels)


def _mask_size(record) -> int:
    """Return the pixels of a record's masks where it or its segmentations name their size, as RLE does; else 720p."""
    from swim_fast.data.source.masks import stated_size

    for segmentations in record.objects:
        for segmentation in segmentations.values():
            if size := stated_size(segmentation) or record.mask_size:
                return math.prod(size)
    return 720 * 1280
