"""What the host knows of a batch: numbers, so that counting them does not wait for a device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swim_fast.labels import count_labels


@dataclass(frozen=True)
class BatchCounts:
    """Sizes of a batch.

    Attributes:
        labels: number of tokens that are predicted.
        lengths: tokens of each sample, without padding.
        token_slots: tokens and padding.
        tags_without_mask: number of tagged nouns without a mask in the frames taken.
        grids: (temporal patches, height, width) of each image and video, in patches before merging.
    """

    labels: int
    lengths: tuple[int, ...]
    token_slots: int
    grids: tuple[tuple[int, int, int], ...]
    tags_without_mask: int = 0

    @classmethod
    def from_batch(cls, batch: dict, tags_without_mask: int = 0) -> BatchCounts:
        """Return the sizes of a batch of `Collator`, best on the CPU: the values are read."""
        rows, length = batch["input_ids"].shape
        lengths: Tensor | None = None
        if batch.get("cu_seq_lens_q") is not None:
            lengths = batch["cu_seq_lens_q"].diff()
        elif batch.get("attention_mask") is not None and batch["attention_mask"].ndim == 2:
            lengths = batch["attention_mask"].sum(1)
        grids = [grid for key in ("image_grid_thw", "video_grid_thw") if key in batch for grid in batch[key].tolist()]
        return cls(
            labels=int(count_labels(batch["labels"])),
            lengths=(length,) * rows if lengths is None else tuple(lengths.tolist()),
            token_slots=rows * length,
            grids=tuple((frames, height, width) for frames, height, width in grids),
            tags_without_mask=tags_without_mask,
        )

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)
