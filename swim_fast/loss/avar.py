"""Attention losses of AVAR, "From Narrow to Panoramic Vision" (arXiv 2603.03825), which need no mask.

The tokens of a question should look at the image rather than at what stands before the question, the system prompt.
With Q the question's tokens, K a set of keys, A the attention probabilities of layer l and head h,

    a(K)  = 1 / (|Q| |K|) Σ_{q ∈ Q} Σ_{k ∈ K} A[l, h, q, k]
    image = − 1/layers Σ_l 1/heads Σ_h log(a(K_image) + ε)            "L_enhance-img"
    system = 1/layers Σ_l 1/heads Σ_h log(a(K_system) + ε)            "L_suppress-sys"

and ε = 1e-6, which keeps the second from running away. Both were weighed with 0.15 there. The sums over keys come from
`swim_kernels.noun_mass`, which forms no map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6


def compute_question_losses(masses: Sequence[Tensor], sample: Tensor, sizes: Tensor) -> Tensor:
    """Return both losses of every sample: [2, G], image and system.

    Args:
        masses: of each layer [R, Hq, 2]: probability that a row pays to the image and to the system's keys.
        sample: [R] int64, the sample in [0, G) that a row belongs to; each has at least one.
        sizes: [G, 2], the number of keys of both sets. A sample without keys in a set has 0 in its place.
    """
    mass = torch.stack(list(masses))  # [layers, R, Hq, 2]
    groups = len(sizes)
    rows = torch.bincount(sample, minlength=groups).to(mass.dtype)
    total = mass.new_zeros(len(mass), groups, *mass.shape[2:]).index_add(1, sample, mass)
    keys = sizes.to(mass.dtype)
    mean = total / (rows[:, None, None] * keys.clamp(min=1)[:, None])  # [layers, G, Hq, 2]
    losses = (mean + EPSILON).log().mean((0, 2)) * (keys > 0)  # [G, 2]
    return torch.stack([-losses[:, 0], losses[:, 1]])
