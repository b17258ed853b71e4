"""The mask loss of the released code (arXiv 2605.18018): eager, in fp32 or float64, with its two epsilons.

    f = Π_l a_l / (Σ Π_l a_l + 1e-6)              the sum is over all visual keys of the row
    p = (f − min f) / (max f − min f + 1e-6)      per patch

and torch's `binary_cross_entropy`, whose logarithms end at −100 and whose gradient's denominator ends at 1e-12.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def fuse(maps: list[Tensor], fusion: str) -> list[Tensor]:
    """Return f [R, N]: one, or one per layer for fusion "none". Columns outside a row's key set must be 0."""
    if fusion == "product":
        maps = [reduce(torch.mul, maps)]
    elif fusion == "mean":
        maps = [torch.stack(maps).mean(0)]
    elif fusion == "add":
        maps = [torch.stack(maps).sum(0)]
    return [f / (f.sum(-1, keepdim=True) + EPSILON) for f in maps]


def min_max(f: Tensor) -> Tensor:
    """Return p of every patch [..., h, w]; 0 on a constant patch."""
    low, high = f.amin((-2, -1), keepdim=True), f.amax((-2, -1), keepdim=True)
    return torch.where(f == low, 0, (f - low) / (high - low + EPSILON))


def bce(p: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy of every p in [0, 1] with targets that broadcast to it; NaN where p is NaN."""
    # torch's also bounds the gradient, but refuses NaN and a 1 that was rounded up; on CUDA that ends the process.
    inside = p - (p - p.clamp(0, 1)).detach()
    loss = F.binary_cross_entropy(inside.nan_to_num(nan=0.0), target.to(p.dtype).expand_as(p), reduction="none")
    return torch.where(p.isnan(), p, loss)
