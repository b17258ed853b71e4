"""Next-token cross-entropy on label positions only."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def label_positions(labels: Tensor) -> Tensor:
    """Positions whose next token is a label in any sequence of the batch.

    Visual tokens and questions carry no label, so the head runs on a small part of the sequence: pass the result as
    `logits_to_keep` to a Hugging Face model.

    Args:
        labels: `[B, L]`, -100 where there is no label.

    Returns:
        Sorted positions `[K]`, int64, on the device of `labels`.
    """
    return (labels[:, 1:] != IGNORE).any(0).nonzero().squeeze(1)


def text_loss_sum(logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Sum of -log p(next token) over the labels.

    Args:
        logits: `[B, K, V]` at `positions` `[K]`.
        labels: `[B, L]`, -100 where there is no label; label t is predicted at position t - 1.

    Returns:
        Scalar fp32. 0 with a graph if there is no label.
    """
    targets = labels[:, positions + 1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def count_labels(labels: Tensor) -> Tensor:
    """Number of labels that are predicted (the first token of a sequence never is); scalar int64."""
    return (labels[:, 1:] != IGNORE).sum()
