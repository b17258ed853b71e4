"""The video or image of a record, and its masks, checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import Mask, read_segmentation
from swim_fast.data.source.records import Record
from swim_fast.data.video.reader import Change, FrameReader, MediaInfo
from swim_fast.options import Decoding


class MediaReader:
    """Reads the video or image of records; picklable, with a decoder of its own in each process."""

    def __init__(self, decoding: Decoding):
        self.name = decoding.reader
        self._reader = FrameReader(decoding)

    def info(self, record: Record) -> MediaInfo:
        """Return number, size and rate of the frames.

        Raises:
            DataError: the video or image cannot be opened.
        """
        with at(record.kind):
            return self._reader.info(record.media, record.kind)

    def frames(self, record: Record, indices: Sequence[int], change: Change | None = None) -> np.ndarray:
        """Return the frames of these indices, uint8 [T, H, W, 3] RGB; each changed as it arrives, if `change` is given.

        Raises:
            DataError: they cannot be decoded.
        """
        with at(record.kind):
            return self._reader.frames(record.media, indices, record.kind, change)

    def compare(self, record: Record) -> bool:
        """Compare the index of a video with its frames decoded in a row; False if it is too long for that.

        Raises:
            DataError: they differ, or it cannot be decoded.
        """
        with at(record.kind):
            return self._reader.compare(record.media)

    def stock_differences(self, record: Record, indices: Sequence[int]) -> list[int]:
        """Return those of sorted frame indices at which decord's own `get_batch` gives other frames; with decord only.

        Raises:
            DataError: the video cannot be decoded.
        """
        with at(record.kind):
            return self._reader.stock_differences(record.media, indices)

    def close(self) -> None:
        """Stop the decoder; the next request starts another."""
        self._reader.close()


@contextmanager
def at(key: str) -> Iterator[None]:
    """Say where in the record the block's errors belong."""
    try:
        yield
    except DataError as error:
        raise error.within(key=key) from error


def read_mask(record: Record, tag: int, frame: int, info: MediaInfo) -> Mask | None:
    """Read and check the mask of the object of a tag in one frame of a clip; None where it is not to be seen.

    Raises:
        DataError: a frame that the clip does not have; a segmentation that does not decode, or does not fit the clip.
    """
    with at(f"annotation[{tag}]['{frame}']"):
        if not 0 <= frame < info.num_frames:
            raise DataError(
                f"frame number past the end: the {record.kind} has {info.num_frames} frames, counted from 0; "
                "correct the annotation or the path of the clip"
            )
        return read_segmentation(record.objects[tag][frame], info.height, info.width, record.mask_size)


def read_masks(
    record: Record, info: MediaInfo, noting: Callable[[], AbstractContextManager] = nullcontext
) -> list[dict[int, Mask]]:
    """Read and check all masks of a record, also those of frames that will not be taken.

    Args:
        record: the record, with a video or image.
        info: that one's number of frames and their size.
        noting: context in which each mask is read; one that swallows DataError leaves that mask out.

    Returns:
        For each tag its masks by frame index; frames without a pixel of it are left out.

    Raises:
        DataError: as for `read_mask`; masks of one object that differ in size.
    """
    masks: list[dict[int, Mask]] = []
    for tag, segmentations in enumerate(record.objects):
        masks.append({})
        for frame in segmentations:
            with noting():
                mask = read_mask(record, tag, frame, info)
                if mask is not None:
                    masks[tag][frame] = mask
        sizes = sorted({(mask.height, mask.width) for mask in masks[tag].values()})
        with noting(), at(f"annotation[{tag}]"):
            if len(sizes) > 1:
                raise DataError(
                    f"masks of one object differ in size: {' and '.join(map(str, sizes[:3]))}; annotate them all at one"
                )
    return masks
