"""Counts of a batch that the host holds, so that reading them does not wait for a device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from swim_fast.data.sample.builder import Sample
from swim_fast.labels import count_labels


def fingerprint(batch: dict) -> int:
    """Return a number of 62 bits by which a batch of `Collator` is told from others: samples, lengths and pairs.

    Of the problems only their number counts: a decoder's words for one fault differ from process to process.
    """
    told = batch["samples"], len(batch["problems"]), batch["counts"], len(batch["mask_targets"])
    return int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:8], "big") >> 2


@dataclass(frozen=True)
class BatchCounts:
    """Sizes of a batch.

    Attributes:
        labels: number of tokens that are predicted.
        lengths: tokens of each sample, without padding.
        token_slots: tokens and padding.
        tags_without_mask: number of tagged nouns without a mask in the frames taken.
        grids: (pictures, rows, columns) of each image and video, in tokens: the vision tower takes pictures apart.
    """

    labels: int
    lengths: tuple[int, ...]
    token_slots: int
    grids: tuple[tuple[int, int, int], ...]
    tags_without_mask: int = 0

    @classmethod
    def from_batch(cls, batch: dict, samples: Sequence[Sample] = ()) -> BatchCounts:
        """Return the sizes of a batch of `Collator`, made of these samples; best on the CPU: the values are read."""
        rows, length = batch["input_ids"].shape
        lengths: Tensor | None = None
        if batch.get("cu_seq_lens_q") is not None:
            lengths = batch["cu_seq_lens_q"].diff()
        elif batch.get("attention_mask") is not None and batch["attention_mask"].ndim == 2:
            lengths = batch["attention_mask"].sum(1)
        return cls(
            labels=int(count_labels(batch["labels"])),
            lengths=(length,) * rows if lengths is None else tuple(lengths.tolist()),
            token_slots=rows * length,
            grids=tuple(grid for sample in samples for grid in sample.grids),
            tags_without_mask=sum(sample.tags_without_mask for sample in samples),
        )

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)
