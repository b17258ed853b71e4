"""Sums over batches, and the averages that are logged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swim_fast.options import METRICS


@dataclass
class Sums:
    """Sums that add up over micro-batches, ranks and logging intervals.

    Numbers, or scalar tensors on the batch's device, so that adding them up does not wait for it.
    """

    text_loss: Tensor | float = 0.0
    mask_loss: Tensor | float = 0.0
    image_loss: Tensor | float = 0.0  # of the samples with a question
    system_loss: Tensor | float = 0.0
    questions: Tensor | float = 0.0  # those samples
    pointing_accuracy: Tensor | float = 0.0
    mass_in_mask: Tensor | float = 0.0
    soft_iou: Tensor | float = 0.0
    grounded_pairs: Tensor | float = 0.0  # pairs that the three metrics are summed over
    labels: Tensor | float = 0.0
    pairs: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    token_slots: Tensor | float = 0.0  # tokens and padding
    skipped: Tensor | float = 0.0  # samples
    tags_without_mask: Tensor | float = 0.0
    flops: Tensor | float = 0.0

    @classmethod
    def from_batch(cls, batch: dict, text: Tensor, mask: Tensor, asked: Tensor, metrics: Tensor) -> Sums:
        """Return the sums of a batch with these losses and the `sum_metrics` of its maps."""
        counts = batch["counts"]
        return cls(
            **dict(zip((*METRICS, "grounded_pairs"), metrics.double(), strict=True)),
            text_loss=text.detach().double(),
            mask_loss=mask.detach().double(),
            image_loss=asked[0].detach().double(),
            system_loss=asked[1].detach().double(),
            questions=len(batch["questions"]),
            labels=counts.labels,
            pairs=len(batch["mask_targets"]),
            tokens=counts.tokens,
            token_slots=counts.token_slots,
            skipped=len(batch["problems"]),
            tags_without_mask=counts.tags_without_mask,
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def to_tensor(self, device: torch.device) -> Tensor:
        """Return all fields as one fp64 tensor, to be reduced over the ranks."""
        return torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=device) for value in vars(self).values()]
        )

    @classmethod
    def from_tensor(cls, values: Tensor) -> Sums:
        """Return what `to_tensor` was made of, as numbers. Waits for the device."""
        return cls(*values.tolist())

    def average(self) -> dict[str, float]:
        """Return each loss per label, pair or question, and the metrics per pair with a mask, of numbers."""
        averages = {"text_loss": self.text_loss / max(self.labels, 1)}
        if self.pairs:
            averages["mask_loss"] = self.mask_loss / self.pairs
        if self.questions:
            averages |= {name: getattr(self, name) / self.questions for name in ("image_loss", "system_loss")}
        if self.grounded_pairs:
            averages |= {name: getattr(self, name) / self.grounded_pairs for name in METRICS}
        if self.skipped:
            averages["skipped"] = int(self.skipped)
        if self.tags_without_mask:
            averages["tags_without_mask"] = int(self.tags_without_mask)
        return averages | {"pairs": int(self.pairs)}
