"""Packing of samples into full batches, in an order that seed and epoch alone decide."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from swim_fast.data.batch.dataset import MixtureSampler


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put things into as few bins as this takes: the longest first, each into the first bin that has room for it.

    Args:
        lengths: int64 [n]; what is longer than `capacity` gets a bin of its own.
        capacity: room in a bin.

    Returns:
        The indices of the things in each bin.
    """
    room = np.full(len(lengths), capacity)
    bins: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = min(int(lengths[index]), capacity)
        first = int(np.argmax(room >= length))
        if first == len(bins):
            bins.append([])
        room[first] -= length
        bins[first].append(index)
    return bins


class PackingSampler(Sampler[list[int]]):
    """Batches of samples that together have at most so many tokens, this rank's share; a loader's `batch_sampler`.

    The samples come in the order of a `MixtureSampler`, `look_ahead` of them at a time. They are packed
    first-fit-decreasing; the emptiest batch of a window is packed again with the next; the batches of a window are
    shuffled and dealt to the ranks in turn. The order depends on the arguments and the epoch alone, so that a run that
    is resumed, which skips the batches it has seen, continues with those it has not. (Resumed with another number of
    epochs, ranks or tokens it continues at about the same sample.)

    Every rank has the same number of batches, and every epoch too, as trainers count on that: the number that the
    fullest of the run's epochs needs. Where there are fewer, the batches with most samples are split, and at last
    empty ones are added, of which `Collator` makes a batch that trains nothing. So every sample of an epoch comes
    exactly once: none is lost and none repeated.

    Args:
        order: the samples of an epoch; `set_epoch` sets its epoch too.
        lengths: int64 [samples of the dataset], tokens of each, see `sample_lengths`. Samples of length 0 (broken
            records) take no room and come up with the others, so that they are reported.
        max_tokens: most tokens of a batch; a sample that is longer has a batch of its own.
        look_ahead: samples that are packed together.
        rank, world_size: this process of how many.
        epochs: epochs of the run.

    Raises:
        ValueError: limits that are not positive, or lengths of another dataset.
    """

    def __init__(
        self,
        order: MixtureSampler,
        lengths: np.ndarray,
        max_tokens: int,
        look_ahead: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        epochs: int = 1,
    ):
        for name, value in (("max_tokens", max_tokens), ("look_ahead", look_ahead)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if len(lengths) != order.num_samples:
            raise ValueError(f"{len(lengths)} lengths for a dataset of {order.num_samples} samples")
        self.order = order
        self.lengths = np.asarray(lengths)
        self.max_tokens, self.look_ahead = max_tokens, look_ahead
        self.rank, self.world_size = rank, world_size
        self.epochs = epochs
        self._counts: dict[int, int] = {}  # batches that an epoch fills, on all ranks together
        self._packed: tuple[int, list[list[int]]] | None = None  # the latest epoch, and its batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.order.set_epoch(epoch)

    def set_steps(self, steps: int) -> None:
        """Set the length of the run in batches of a rank, instead of epochs."""
        self.epochs = 1
        self.epochs = -(-steps // max(len(self), 1))

    def __len__(self) -> int:
        """Return the batches of this rank in every epoch. The first call packs each epoch of the run once."""
        most = max(self._count(epoch) for epoch in range(self.epochs))
        return -(-most // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.order.epoch >= self.epochs:
            raise ValueError(f"epoch {self.order.epoch} of a run of {self.epochs} epochs, counted from 0")
        batches = list(self._pack(self.order.epoch))
        _split(batches, len(self) * self.world_size)
        yield from batches[self.rank :: self.world_size]

    def efficiency(self) -> float:
        """Return the tokens of the current epoch over the room for them in all batches of all ranks."""
        batches = self._pack(self.order.epoch)
        useful = sum(int(self.lengths[batch].sum()) for batch in batches)
        return useful / max(len(self) * self.world_size * self.max_tokens, 1)

    def _count(self, epoch: int) -> int:
        if epoch not in self._counts:
            self._counts[epoch] = len(self._pack(epoch))
        return self._counts[epoch]

    def _pack(self, epoch: int) -> list[list[int]]:
        """Return all batches of an epoch, of all ranks."""
        if self._packed is None or self._packed[0] != epoch:
            self._packed = epoch, self._packed_anew(epoch)
        return self._packed[1]

    def _packed_anew(self, epoch: int) -> list[list[int]]:
        items = self.order.items(epoch).numpy()
        shuffle = self.order.make_generator(epoch)
        shuffle.manual_seed(int(torch.randint(2**62, (1,), generator=shuffle)))  # not the numbers of the order
        batches: list[list[int]] = []
        left = items[:0]
        for start in range(0, len(items), self.look_ahead):
            window = np.concatenate((left, items[start : start + self.look_ahead]))
            packed = first_fit_decreasing(self.lengths[window], self.max_tokens)
            left = window[:0]
            if start + self.look_ahead < len(items):
                used = [int(self.lengths[window[batch]].sum()) for batch in packed]
                left = window[packed.pop(int(np.argmin(used)))]
            order = torch.randperm(len(packed), generator=shuffle).tolist()
            batches += [window[packed[index]].tolist() for index in order]
        return batches


def _split(batches: list[list[int]], count: int) -> None:
    """Extend a list of batches to `count` by splitting those with most samples, then by adding empty ones."""
    for index in sorted(range(len(batches)), key=lambda index: -len(batches[index])):
        batch = batches[index]
        if len(batches) >= count or len(batch) < 2:
            break
        batches[index] = batch[::2]
        batches.append(batch[1::2])
    batches += [[] for _ in range(count - len(batches))]
