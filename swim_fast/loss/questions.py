"""Rows of the tokens of questions, and the sets of keys that their attention is summed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from swim_kernels import NounQueries


@dataclass(frozen=True, eq=False)
class Questions:
    """Inputs of `noun_mass` and `swim_fast.loss.avar` for a batch with G samples that ask about a video or image.

    Attributes:
        queries: R rows, the questions' tokens behind the video or image; `key_set` is the sample.
        sets: int64 [G, 2, M], the keys of the video or image and those before the question, filled up with −1.
        sizes: int64 [G, 2], the number of keys of both.
    """

    queries: NounQueries
    sets: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device, non_blocking: bool = False) -> Questions:
        """Return the same on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Questions:
        """Return the same in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable) -> Questions:
        return Questions(*(change(part) for part in (self.queries, self.sets, self.sizes)))
