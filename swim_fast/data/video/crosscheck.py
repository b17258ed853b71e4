"""Comparisons of what a clip's index claims with what its decoder gives; for `data check`, in the decoding child."""

from __future__ import annotations

import time

import numpy as np

from swim_fast.data.video.containers import Broken

SHARE_OF_TIME = 1 / 3  # of a request's seconds, for decoding in a row; what is left is for the same frames by seeking


def compare_in_a_row(clip, seconds: float) -> bool:
    """Decode a clip in a row; compare the number of its frames, and five of them as a request for these gives them.

    Args:
        clip: one of the readers' clips.
        seconds: time that all of it may take.

    Returns:
        True, or False where the time was too short for the whole clip: only the frames up to there were compared.

    Raises:
        Broken: they differ.
    """
    count = clip.num_frames
    wanted = {index * (count - 1) // 4 for index in range(5)}
    deadline, reached, found, complete = time.monotonic() + seconds * SHARE_OF_TIME, 0, {}, True
    for frame in clip.in_a_row(wanted):
        if reached in wanted:
            found[reached] = frame
        reached += 1
        if time.monotonic() > deadline:
            complete = reached >= count
            break
    if complete and reached != count:
        raise Broken(
            f"the file claims {count} frames, but decoding it in a row gives {reached}: masks may be off; re-encode "
            "it, or try another reader"
        )
    again = np.empty((len(found), clip.height, clip.width, 3), np.uint8)
    clip.read(list(found), again)
    for index, sought in zip(found, again, strict=True):
        if not np.array_equal(found[index], sought):
            raise Broken(
                f"frame {index} differs when it is sought from when the clip is decoded in a row: masks may be off; "
                "re-encode it, or try another reader"
            )
    return complete


def stock_differences(clip, indices: list[int]) -> list[int]:
    """Return those of some frame indices for which decord's own `get_batch` gives other than the displayed frames."""
    shown = np.empty((len(indices), clip.height, clip.width, 3), np.uint8)
    clip.read(indices, shown)
    stock = clip.stock_batch(indices)
    if stock is None:
        return []
    return [
        index for index, ours, theirs in zip(indices, shown, stock, strict=True) if not np.array_equal(ours, theirs)
    ]
