"""Several files as one dataset of samples, and the random order of a mixture of them."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from swim_fast.data.batch.workers import keep_freed_memory
from swim_fast.data.sample.builder import Sample
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.errors import OptionError, ProcessorError
from swim_fast.options import Source


class SwimDataset(Dataset):
    """Several files as one dataset of samples, one file after the other.

    An item is a `Sample`, or the `DataError` that says why there is none: bad data never raises, so that it neither
    ends the run nor is replaced in silence. `Collator` drops and lists the errors.

    Args:
        sources: at least one.
        builder: makes a sample of a record, a `SampleBuilder`; sources with pixel limits of their own get a copy of it.

    Raises:
        OptionError: no sources, or pixel limits of a source that contradict the others.
        DataError: a source that cannot be read at all.
        ProcessorError: pixel limits of a source that contradict the processor's.

    Attributes:
        builders: what makes the samples of each source.
    """

    def __init__(self, sources: Sequence[Source], builder: Callable[[Record], Sample]):
        if not sources:
            raise OptionError("no data: name at least one file")
        self.sources = tuple(sources)
        self.builder = builder
        self.builders = [builder_of_source(builder, source) for source in self.sources]
        self.files = [RecordFile.from_source(source) for source in self.sources]
        self.names = [source.name or os.path.basename(source.path) for source in self.sources]
        self.lengths = [
            len(file) if source.limit is None else min(source.limit, len(file))
            for source, file in zip(self.sources, self.files, strict=True)
        ]
        self._ends = list(itertools.accumulate(self.lengths))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the indices of an item's source and of its record there.

        Raises:
            IndexError: outside the dataset.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a dataset of {len(self)}")
        source = bisect.bisect_right(self._ends, index)
        return source, index - (self._ends[source] - self.lengths[source])

    def __getitem__(self, index: int) -> Sample | DataError:
        keep_freed_memory()
        source, record = self.locate(index)
        try:
            return self.builders[source](self.files[source][record])
        except DataError as error:
            return error.within(source=self.sources[source].path, record=record)


def builder_of_source(builder: Callable[[Record], Sample], source: Source) -> Callable[[Record], Sample]:
    """Return what makes the samples of a source. Errors as for `SampleBuilder.replace`, naming the source."""
    if not source.own_sampling:
        return builder
    try:
        return builder.replace(**source.own_sampling)
    except (OptionError, ProcessorError) as error:
        raise type(error)(f"{source.path}: {error}") from error


class MixtureSampler(Sampler[int]):
    """Random order of a dataset, with each source as often per epoch as its weight says.

    A source of n records and weight w gives round(w · n) items: ⌊w⌋ whole passes and a random remainder without
    repetition, drawn anew each epoch. The order depends on `seed` and epoch alone: a resumed run and every rank see
    the same one.

    Args:
        dataset: the sources' dataset.
        seed: any integer.

    Attributes:
        num_samples: size of the dataset, of which the items of an epoch are taken.
    """

    def __init__(self, dataset: SwimDataset, seed: int):
        self.seed = seed
        self.epoch = 0
        self.num_samples = len(dataset)
        self._sources = []  # first item, number of records, number of items per epoch
        first = 0
        for source, length in zip(dataset.sources, dataset.lengths, strict=True):
            self._sources.append((first, length, max(round(source.weight * length), min(length, 1))))
            first += length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(count for _, _, count in self._sources)

    def __iter__(self) -> Iterator[int]:
        yield from self.items(self.epoch).tolist()

    def make_generator(self, epoch: int) -> torch.Generator:
        """Return the source of an epoch's random numbers."""
        # The two numbers are mixed by the generator of the first draw: seed + epoch would make epoch 1 of seed 0 the
        # same as epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(self.seed)
        return generator.manual_seed(int(torch.randint(2**62, (epoch + 1,), generator=generator)[-1]))

    def items(self, epoch: int) -> Tensor:
        """Return the items of an epoch in their order, int64 [items]."""
        generator = self.make_generator(epoch)
        items = []
        for first, length, count in self._sources:
            passes, rest = divmod(count, length) if length else (0, 0)
            items += [torch.arange(first, first + length)] * passes
            items.append(first + torch.randperm(length, generator=generator)[:rest])
        items = torch.cat(items)
        return items[torch.randperm(len(items), generator=generator)]
