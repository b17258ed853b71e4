"""Choice of a clip's frames and their size, and of the temporal patches that masks supervise.

Nothing here needs a decoded frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import union
from swim_fast.data.video.reader import MediaInfo
from swim_fast.families.sizes import Limits
from swim_fast.options import Sampling


@dataclass(frozen=True)
class FrameChoice:
    """Frames chosen of a clip, and their size.

    Attributes:
        frames: sorted frame indices, an even count.
        max_pixels: limit for the processor's resizing where `total_pixels` lowers it; None: the processor's own.
        notes: remarks for the user.
    """

    frames: list[int]
    max_pixels: int | None = None
    notes: tuple[str, ...] = ()


def plan_frames(
    info: MediaInfo,
    annotated: Sequence[int],
    limits: Limits,
    sampling: Sampling,
) -> FrameChoice:
    """Choose frames and size of a clip, see `count_frames`, `fit_pixels` and `choose_frames`.

    Args:
        info: the clip's number of frames, rate and size.
        annotated: distinct indices of the frames that carry masks.
        limits: sizes that the model's processor takes.
        sampling: limits on frames and pixels.

    Raises:
        DataError: an annotated frame that the clip does not have; not even two frames within `total_pixels`.
    """
    frames = choose_frames(info.num_frames, annotated, count_frames(info, len(annotated), sampling))
    total_pixels = sampling.total_pixels
    if total_pixels is None:
        return FrameChoice(frames)
    before = _size(limits, len(frames), info.height, info.width)
    if len(frames) * math.prod(before) <= total_pixels:
        return FrameChoice(frames)
    count, max_pixels = fit_pixels(len(frames), info.height, info.width, limits, total_pixels)
    after = _size(limits, count, info.height, info.width, max_pixels)
    note = (
        f"{len(frames)} frames of {before[0]} × {before[1]} pixels became {count} of {after[0]} × {after[1]} "
        f"to keep total_pixels {total_pixels:,}"
    )
    return FrameChoice(choose_frames(info.num_frames, annotated, count), max_pixels, (note,))


def count_frames(info: MediaInfo, num_annotated: int, sampling: Sampling) -> int:
    """Return the most frames to take from a clip.

    With `fps` so many for every second of it, rounded up to an even number, at least the annotated ones and at most
    `max_frames`; without, `max_frames`.
    """
    if sampling.fps is None:
        return sampling.max_frames
    # 29.97 · (1 / 29.97) is not quite 1
    wanted = max(math.ceil(info.num_frames / info.fps * sampling.fps - 1e-6), num_annotated, 2)
    return min(wanted + wanted % 2, sampling.max_frames)


def fit_pixels(count: int, height: int, width: int, limits: Limits, total_pixels: int) -> tuple[int, int]:
    """Return how many frames of what size together have at most `total_pixels`.

    Args:
        count: frames that are wanted, an even number.
        height, width: size of the clip.

    Returns:
        Number of frames, even, and the limit on the pixels of one: the limit is lowered first, evenly for all frames,
        and only where `limits.lowest` is reached are there fewer frames.

    Raises:
        DataError: two frames are too many.
    """
    for fewer in range(count, 0, -2):
        lowest, most = limits.range(fewer)
        share = max(lowest, min(most, total_pixels // fewer))
        for highest in (share, lowest):  # a frame one token wide comes out above the limit that it is given
            if fewer * math.prod(_size(limits, fewer, height, width, highest)) <= total_pixels:
                return fewer, highest
    least = _size(limits, 2, height, width, lowest)
    raise DataError(
        f"two frames of {least[0]} × {least[1]} pixels, the least that min_pixels {lowest:,} allows of "
        f"{height} × {width}, are more than total_pixels {total_pixels:,}; raise total_pixels or lower min_pixels"
    )


def _size(limits: Limits, frames: int, height: int, width: int, highest: int | None = None) -> tuple[int, int]:
    """Return the size that frames are given; a shape that the processor does not take is the record's fault."""
    try:
        return limits.size(frames, height, width, highest)
    except ValueError as error:
        raise DataError(f"the model's processor refuses frames of {height} × {width}: {error}") from error


def choose_frames(num_frames: int, annotated: Iterable[int], max_frames: int) -> list[int]:
    """Choose the frames of a clip: every annotated one, filled up evenly with others.

    Args:
        num_frames: frames in the clip.
        annotated: indices of frames that carry masks, in any order.
        max_frames: limit on the length of the result; an odd one counts as the even number below.

    Returns:
        Sorted frame indices, an even count of at most `max_frames`. Annotated frames are thinned evenly if there are
        too many, and filled up evenly with the frames that are left; a clip shorter than the limit gives all of its
        frames. No frame occurs twice, except that the last one is repeated where the count would be odd.

    Raises:
        DataError: an annotated frame that the clip does not have.
        ValueError: `max_frames` below 2 or an empty clip.
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
    frames: Sequence[int],
    masks: Mapping[int, np.ndarray | None],
    temporal_patch_size: int = 2,
    supervise: str = "either",
) -> dict[int, np.ndarray]:
    """Return the temporal patches in which one object is annotated.

    Args:
        frames: the chosen frames of the clip, as many as fill whole patches; patch p holds frames
            `p * temporal_patch_size` to `(p + 1) * temporal_patch_size - 1` of this list.
        masks: the object's masks, uint8 [h, w], by frame index; frames that were not chosen are ignored.
        temporal_patch_size: frames of a patch.
        supervise: `either` takes the masks of all frames of a patch, `second` those of its last frame alone.

    Returns:
        patch index -> union of the object's masks in that patch, in ascending order, only where there is a mask.

    Raises:
        DataError: masks of different sizes meet in one patch.
    """
    if len(frames) % temporal_patch_size:
        raise ValueError(f"{len(frames)} frames do not fill patches of {temporal_patch_size}")
    patches = {}
    for patch in range(len(frames) // temporal_patch_size):
        inside = frames[patch * temporal_patch_size : (patch + 1) * temporal_patch_size]
        counted = inside[-1:] if supervise == "second" else dict.fromkeys(inside)
        mask = union(masks.get(frame) for frame in counted)
        if mask is not None:
            patches[patch] = mask
    return patches


def _evenly(length: int, count: int) -> np.ndarray:
    """Return `min(length, count)` of `length` indices, evenly spaced, first and last included from two on."""
    if count >= length:
        return np.arange(length)
    if count == 1:
        return np.array([length // 2])
    return np.round(np.linspace(0, length - 1, max(count, 0))).astype(np.int64)
