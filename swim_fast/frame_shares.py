"""The temporal patches that each of the ranks that share a sample decodes and encodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class FrameShare(NamedTuple):
    """One of P ranks that share a sample."""

    ranks: int
    rank: int

    def of_clip(self, patches: int) -> range:
        """Return the temporal patches of a clip that the rank decodes: a P-th of them, neighbours; all if it is one."""
        if patches == 1:
            return range(1)
        return range(patches * self.rank // self.ranks, patches * (self.rank + 1) // self.ranks)


def divide_patches(clips: Iterable[int], ranks: int) -> list[list[range]]:
    """Return the temporal patches that each rank encodes of each clip; clips of a single one go to the ranks in turn.

    Args:
        clips: temporal patches of the clips of a batch, or 1 for each image.
        ranks: P.

    Returns:
        A list of P ranges for each clip, which follow each other.
    """
    shares, turn = [], 0
    for patches in clips:
        if patches == 1:
            shares.append([range(rank > turn, rank >= turn) for rank in range(ranks)])
            turn = (turn + 1) % ranks
        else:
            shares.append([FrameShare(ranks, rank).of_clip(patches) for rank in range(ranks)])
    return shares
