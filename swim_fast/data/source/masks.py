"""Object masks of records: COCO run-length codes and polygons to arrays of 0 and 1, with every check."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from swim_fast.data.source.errors import DataError


def unwrapped(segmentation: Any) -> Any:
    """Return what is inside `{"segmentation": …}`, however often it is wrapped."""
    while isinstance(segmentation, dict) and "segmentation" in segmentation:
        segmentation = segmentation["segmentation"]
    return segmentation


def stated_size(segmentation: Any) -> tuple[int, int] | None:
    """Return the height and width that a run-length code states; None where it states none, or nonsense."""
    code = unwrapped(segmentation)
    size = code.get("size") if isinstance(code, dict) else None
    return tuple(size) if _is_size(size) else None


def _is_size(size: Any) -> bool:
    return isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """Decode one segmentation.

    Args:
        segmentation: COCO RLE `{"size": [h, w], "counts": str | bytes | list of runs}` (without `size`, the frame's), a
            list of polygons `[[x0, y0, x1, y1, …], …]` in pixels of the frame, either of them wrapped as
            `{"segmentation": …}`, or null.
        height, width: size of the video's frames in pixels. A run-length code may have another size of the same
            aspect ratio (annotations made on a resized copy), up to one pixel of rounding.

    Returns:
        uint8 [h, w] of 0 and 1, C-contiguous, in the mask's own size; None where nothing is marked: null, an empty
        dict, list or string, or a mask without a single pixel, which cannot say where the object is.

    Raises:
        DataError: unknown form, a code that does not decode, a size that does not fit the video, polygons that are
            malformed or leave the frame.
    """
    segmentation = unwrapped(segmentation)
    if segmentation is None or (isinstance(segmentation, dict | list | str) and not segmentation):
        return None
    if isinstance(segmentation, dict):
        mask = _decode_rle(segmentation, height, width)
    elif isinstance(segmentation, list):
        mask = _rasterise(segmentation, height, width)
    else:
        raise DataError(
            f"the segmentation is a {type(segmentation).__name__}; expected a COCO run-length code "
            '{"size": [h, w], "counts": …}, a list of polygons, or null'
        )
    return mask if mask is not None and mask.any() else None


def union(masks: Iterable[np.ndarray | None]) -> np.ndarray | None:
    """Return the union of masks of one size, uint8 [h, w]; None entries are skipped, None if nothing else is there.

    Raises:
        DataError: the masks differ in size.
    """
    masks = [mask for mask in masks if mask is not None]
    if not masks:
        return None
    sizes = {mask.shape for mask in masks}
    if len(sizes) > 1:
        raise DataError(
            f"masks of one object in neighbouring frames differ in size: {' and '.join(map(str, sorted(sizes)))}; "
            "annotate them all at one size"
        )
    return np.maximum.reduce(masks)


def _decode_rle(code: dict, height: int, width: int) -> np.ndarray | None:
    counts, size = code.get("counts"), code.get("size")
    if counts is None or (isinstance(counts, str | bytes | list) and not counts):
        return None
    if size is None:
        size = [height, width]
    if not _is_size(size):
        raise DataError(f"mask size {size!r} is not [height, width] in pixels")
    check_mask_size(*size, height, width)
    if isinstance(counts, str | bytes):
        runs = _decompress(counts)
    elif isinstance(counts, list):
        if not all(type(n) is int for n in counts):
            raise DataError("run-length code does not decode: counts holds something else than whole numbers")
        runs = np.array(counts, dtype=np.int64)
    else:
        raise DataError(f"run-length code does not decode: counts is a {type(counts).__name__}, not a string or list")
    if (runs < 0).any():
        raise DataError("run-length code does not decode: it holds a negative run; it is damaged or cut off")
    pixels = size[0] * size[1]
    # A sum in floating point cannot wrap around, and is exact up to sizes far beyond any mask.
    if float(runs.sum(dtype=np.float64)) != pixels:
        raise DataError(
            f"run-length code does not decode: its runs cover {runs.sum(dtype=np.float64):.0f} pixels, "
            f"its size {size[0]} x {size[1]} (height x width) has {pixels}; it is damaged, cut off or of another size"
        )
    values = np.zeros(len(runs), np.uint8)
    values[1::2] = 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(size[1], size[0]).T)


def _decompress(counts: str | bytes) -> np.ndarray:
    """Read COCO's text form of runs: 6-bit digits, 5 of them payload, low ones first, differences to two before."""
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        raise DataError("run-length code does not decode: it holds non-ASCII characters") from None
    digits = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    wrong = np.flatnonzero((digits < 0) | (digits > 63))
    if len(wrong):
        raise DataError(
            f"run-length code does not decode: character {chr(data[wrong[0]])!r} at position {wrong[0]} does not occur "
            "in such codes; were backslashes lost on the way?"
        )
    last = (digits & 32) == 0  # of a number
    if not last[-1]:
        raise DataError("run-length code does not decode: it ends inside a number; it was cut off")
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 12:  # 60 bits
        raise DataError("run-length code does not decode: it holds a number of more than 60 bits; it is damaged")
    index = np.arange(len(digits)) - np.repeat(starts, lengths)  # of the digit in its number
    numbers = np.add.reduceat((digits & 31) << (5 * index), starts)
    negative = (digits[ends] & 16) != 0
    numbers[negative] -= np.int64(1) << (5 * lengths[negative])
    # From the fourth number on: difference to the number two before.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def check_mask_size(mask_height: int, mask_width: int, height: int, width: int) -> None:
    """Raise DataError unless a mask has the frame's size, or its aspect ratio with one side off by at most a pixel."""
    sides = mask_height, mask_width, height, width
    if abs(mask_width * height - mask_height * width) <= max(sides):
        return
    hint = "is it meant for another video?"
    if abs(mask_height * height - mask_width * width) <= max(sides):
        hint = "height and width look exchanged: size is [height, width] of the upright frame"
    raise DataError(
        f"mask size {mask_height} x {mask_width} does not fit the video's {height} x {width} (height x width), nor its "
        f"aspect ratio; {hint}"
    )


def _rasterise(polygons: list, height: int, width: int) -> np.ndarray:
    from pycocotools import mask as coco

    for number, polygon in enumerate(polygons):
        what = f"polygon {number}"
        if not isinstance(polygon, list) or not all(type(value) in (int, float) for value in polygon):
            raise DataError(f"{what} is not a flat list of coordinates [x0, y0, x1, y1, …]")
        if len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"{what} has {len(polygon)} coordinates; it needs x and y of at least three points")
        x, y = np.array(polygon[0::2], np.float64), np.array(polygon[1::2], np.float64)
        # Written so that NaN is refused as well; annotation tools overshoot the border by up to a pixel.
        if not ((x >= -1).all() and (y >= -1).all() and (x <= width + 1).all() and (y <= height + 1).all()):
            raise DataError(
                f"{what} leaves the frame: x {x.min():g} to {x.max():g}, y {y.min():g} to {y.max():g}, the frame is "
                f"{width} wide and {height} high; coordinates are pixels of the video's frames"
            )
    return np.ascontiguousarray(coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))))
