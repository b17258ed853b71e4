"""Labels of text tokens: which are predicted, and by which position."""

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100  # of a token that is not trained on, as everywhere in transformers


def count_labels(labels: Tensor) -> Tensor:
    """Return the number of labels that are predicted (the first token of a sequence never is); scalar int64."""
    return (labels[:, 1:] != IGNORED_LABEL).sum()


def shift_labels(labels: Tensor) -> Tensor:
    """Return the label that each position predicts, that of the token behind it: [B, L] -> [B · L]."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()


def find_label_positions(labels: Tensor) -> Tensor:
    """Return the positions that predict a label, int64 [n], counted through all sequences of [B, L].

    The first token of a sequence is never predicted. On an accelerator this waits for the device: how many there are is
    a value. `Collator` finds them on the CPU.
    """
    return (shift_labels(labels) != IGNORED_LABEL).nonzero().squeeze(1)
