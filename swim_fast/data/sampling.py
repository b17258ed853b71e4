"""Which frames of a clip are used, and which temporal patches the masks supervise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from swim_fast.data.errors import DataError
from swim_fast.data.masks import union


def choose_frames(num_frames: int, annotated: Iterable[int], max_frames: int) -> list[int]:
    """Choose the frames of a clip: every annotated one, filled up evenly with others.

    Args:
        num_frames: frames in the clip.
        annotated: frame numbers that carry masks, in any order.
        max_frames: limit on the length of the result; an odd one counts as the even number below.

    Returns:
        Sorted frame numbers, an even count of at most ``max_frames``. Annotated frames are thinned evenly if there are
        too many; the other places go evenly to the frames that are left; a clip shorter than the limit gives all of
        its frames. No frame occurs twice, except that the last one is repeated where the count would be odd.

    Raises:
        DataError: an annotated frame that the clip does not have.
        ValueError: ``max_frames`` below 2 or an empty clip.
    """
    if max_frames < 2:
        raise ValueError(f"max_frames is {max_frames}: two frames make one temporal patch, so at least 2 are needed")
    if num_frames < 1:
        raise ValueError("the clip has no frames")
    annotated = np.unique(np.fromiter(annotated, dtype=np.int64))
    beyond = annotated[(annotated < 0) | (annotated >= num_frames)]
    if len(beyond):
        raise DataError(
            f"annotated frame number {beyond[0]} is past the end: the clip has {num_frames} frames, 0 to "
            f"{num_frames - 1}; do the annotations belong to this file?"
        )
    limit = max_frames - max_frames % 2
    chosen = annotated[_evenly(len(annotated), limit)]
    rest = np.setdiff1d(np.arange(num_frames), chosen, assume_unique=True)
    chosen = np.sort(np.concatenate((chosen, rest[_evenly(len(rest), limit - len(chosen))]))).tolist()
    return chosen + chosen[-1:] * (len(chosen) % 2)


def supervised_patches(
    frames: Sequence[int], masks: Mapping[int, np.ndarray | None], temporal_patch_size: int = 2
) -> dict[int, np.ndarray]:
    """The temporal patches in which one object is annotated.

    Args:
        frames: the chosen frames of the clip, as many as fill whole patches; patch p holds frames
            ``p * temporal_patch_size`` to ``(p + 1) * temporal_patch_size - 1`` of this list.
        masks: the object's masks, uint8 ``[h, w]``, by frame number; frames that were not chosen are ignored.

    Returns:
        patch number -> union of the object's masks in that patch, in ascending order, only where there is a mask.

    Raises:
        DataError: masks of different sizes meet in one patch.
    """
    if len(frames) % temporal_patch_size:
        raise ValueError(f"{len(frames)} frames do not fill patches of {temporal_patch_size}")
    patches = {}
    for patch in range(len(frames) // temporal_patch_size):
        inside = dict.fromkeys(frames[patch * temporal_patch_size : (patch + 1) * temporal_patch_size])
        mask = union(masks.get(frame) for frame in inside)
        if mask is not None:
            patches[patch] = mask
    return patches


def _evenly(length: int, count: int) -> np.ndarray:
    """Positions of ``min(length, count)`` of ``length`` things, evenly spaced, first and last included from two on."""
    if count >= length:
        return np.arange(length)
    if count == 1:
        return np.array([length // 2])
    return np.round(np.linspace(0, length - 1, max(count, 0))).astype(np.int64)
