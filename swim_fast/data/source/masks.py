"""Object masks of records: COCO run-length codes and polygons, checked and decoded in linear time."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from swim_fast.data.source.errors import DataError, shown

# Bounds on one mask. A frame of 8K has half of MAX_PIXELS, its outline a hundredth of MAX_OUTLINE.
MAX_PIXELS = 1 << 26
MAX_OUTLINE = 1 << 20  # pixels along the polygons
MAX_POLYGONS = 10_000
_MAX_SIDE = 1 << 20


@dataclass(frozen=True)
class Mask:
    """A checked mask with at least one pixel, in run-length code.

    Attributes:
        height, width: size in pixels.
        runs: [N] int64, lengths of runs of 0 and 1 in turn, down the columns; they cover the size exactly.
    """

    height: int
    width: int
    runs: np.ndarray

    @property
    def area(self) -> float:
        """Share of the pixels that are 1."""
        return float(self.runs[1::2].sum() / (self.height * self.width))

    def decode(self) -> np.ndarray:
        """Return the pixels, uint8 [height, width] of 0 and 1, column after column as they are coded."""
        values = np.zeros(len(self.runs), np.uint8)
        values[1::2] = 1
        return np.repeat(values, self.runs).reshape(self.width, self.height).T

    @property
    def key(self) -> tuple[int, int, bytes]:
        """Equal for equal masks."""
        return self.height, self.width, self.runs.tobytes()


def stated_size(segmentation: Any) -> tuple[int, int] | None:
    """Return the height and width that a run-length code states; None where it states none, or nonsense."""
    while isinstance(segmentation, dict) and "segmentation" in segmentation:
        segmentation = segmentation["segmentation"]
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    return tuple(size) if is_size(size) else None


def is_size(size: Any) -> bool:
    """Tell whether a value is [height, width] of a mask: two whole numbers of pixels, neither of them absurd."""
    is_pair = isinstance(size, list | tuple) and len(size) == 2
    return is_pair and all(type(side) is int and 0 < side <= _MAX_SIDE for side in size)


def read_segmentation(
    segmentation: Any, height: int, width: int, drawn_on: tuple[int, int] | None = None
) -> Mask | None:
    """Read and check one segmentation; its pixels are not filled in.

    Args:
        segmentation: COCO RLE `{"size": [h, w], "counts": str | bytes | list of runs}`, a list of polygons
            `[[x0, y0, x1, y1, …], …]` in pixels, either of them wrapped as `{"segmentation": …}`, or null.
        height, width: size of the video's frames in pixels. A mask may have another size of the same aspect ratio
            (annotations made on a resized copy), up to one pixel of rounding.
        drawn_on: height and width to which polygons, and codes without `size`, refer; None: the frame's. A wrapper may
            name its own, as `height` and `width`.

    Returns:
        The mask; None where nothing is marked: null, an empty dict, list or string, or a mask without a single pixel,
        which cannot say where the object is.

    Raises:
        DataError: unknown form or keys, a box without mask, a code that does not decode, a size that does not fit the
            video, polygons that are malformed or leave the frame, and masks beyond the bounds of this module.
    """
    while isinstance(segmentation, dict) and "segmentation" in segmentation:
        drawn_on = own_size(segmentation) or drawn_on
        if not segmentation["segmentation"] and _is_box(segmentation.get("bbox")):
            raise DataError("has a bbox but no mask; give its segmentation, or leave the frame out")
        segmentation = segmentation["segmentation"]
    if segmentation is None or (isinstance(segmentation, dict | list | str) and not segmentation):
        return None
    size = (height, width) if drawn_on is None else drawn_on
    if isinstance(segmentation, dict):
        mask = _read_rle(segmentation, height, width, size)
    elif isinstance(segmentation, list):
        _check_size(size, height, width)
        mask = Mask(*size, _outline_runs(segmentation, *size))
    else:
        raise DataError(
            f"the segmentation is a {type(segmentation).__name__}; expected a COCO run-length code "
            '{"size": [h, w], "counts": …}, a list of polygons, or null'
        )
    return mask if mask is not None and mask.runs[1::2].any() else None


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """Return the pixels of a segmentation, uint8 [h, w] in its own size, or None; see `read_segmentation`."""
    mask = read_segmentation(segmentation, height, width)
    return None if mask is None else np.ascontiguousarray(mask.decode())


def own_size(holder: dict) -> tuple[int, int] | None:
    """Return the `height` and `width` in pixels that a record or segmentation states for its masks.

    Raises:
        DataError: one without the other, or no whole numbers.
    """
    sides = [holder.get("height"), holder.get("width")]
    if sides == [None, None]:
        return None
    if not is_size(sides):
        raise DataError(
            f"height {shown(sides[0])} and width {shown(sides[1])} are no size in pixels, which the masks need; "
            "correct or remove both"
        )
    return sides[0], sides[1]


def _is_box(box: Any) -> bool:
    return isinstance(box, list | dict) and bool(box) and any(box)


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
    return functools.reduce(np.maximum, masks)


def _read_rle(code: dict, height: int, width: int, size: tuple[int, int]) -> Mask | None:
    _check_keys(code)
    counts = code.get("counts")
    if counts is None or (isinstance(counts, str | bytes | list) and not counts):
        return None
    if code.get("size") is not None:
        size = code["size"]
    if not is_size(size):
        raise DataError(f"mask size {shown(size)} is not [height, width] in pixels")
    _check_size(size, height, width)
    if isinstance(counts, str | bytes):
        runs = _decompress(counts)
    elif isinstance(counts, list):
        if not all(type(n) is int for n in counts):
            raise DataError("run-length code does not decode: counts holds something else than whole numbers")
        try:
            runs = np.array(counts, dtype=np.int64)
        except OverflowError:
            raise DataError("run-length code does not decode: it holds a number of more than 64 bits") from None
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
    return Mask(*size, runs)


def _check_keys(code: dict) -> None:
    """Refuse a dictionary that is no run-length code, such as one whose key is misspelt."""
    if "counts" in code or set(code) <= {"size"}:
        return
    others = [key for key in code if key != "size"]
    known = ["segmentation", "counts"]
    near = [match for key in others for match in difflib.get_close_matches(key[:20], known, n=1, cutoff=0.6)]
    hint = f"did you mean {near[0]!r}?" if near else 'give {"segmentation": …}, or null where there is no mask'
    if any(key in ("bbox", "box") for key in others):
        hint = "a box is no mask"
    raise DataError(f"holds no segmentation but {', '.join(map(shown, others[:5]))}; {hint}")


def _check_size(size: tuple[int, int], height: int, width: int) -> None:
    check_mask_size(*size, height, width)
    if size[0] * size[1] > max(MAX_PIXELS, height * width):
        raise DataError(f"mask size {size[0]} x {size[1]} has more than {MAX_PIXELS:,} pixels; make it smaller")


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
    if lengths.max() > 8:  # sums of longer ones could wrap around
        raise DataError("run-length code does not decode: it holds a number of more than 40 bits; it is damaged")
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


def _outline_runs(polygons: list, height: int, width: int) -> np.ndarray:
    """Return the runs of the union of polygons, filled as pycocotools fills them."""
    from pycocotools import mask as coco

    if len(polygons) > MAX_POLYGONS:
        raise DataError(f"{len(polygons):,} polygons in one mask, more than {MAX_POLYGONS:,}; give a run-length code")
    outline, highest = 0.0, 0.0
    for number, polygon in enumerate(polygons):
        points = _read_polygon(polygon, f"polygon {number}", height, width)
        outline += (1 + np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)).sum()
        highest = max(highest, points.max())
    if highest <= 1 < max(height, width) / 2:
        raise DataError(
            "all coordinates of the polygons are at most 1: they look like fractions of the frame; multiply them by "
            f"its width and height, {width} and {height} pixels"
        )
    if outline > MAX_OUTLINE:
        raise DataError(
            f"the polygons' outline is {outline:,.0f} pixels long, more than {MAX_OUTLINE:,}; give a run-length code"
        )
    codes = coco.frPyObjects(polygons, height, width)
    ends = [np.cumsum(_decompress(code["counts"])) for code in codes]
    begin = np.concatenate([e[: len(e) // 2 * 2 : 2] for e in ends])
    end = np.concatenate([e[1::2] for e in ends])
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], np.maximum.accumulate(end[order])
    apart = np.flatnonzero(begin[1:] > end[:-1])
    edges = np.stack((begin[[0, *(apart + 1)]], end[[*apart, -1]]), axis=1) if len(begin) else begin
    return np.diff(np.concatenate(([0], edges.ravel(), [height * width])))


def _read_polygon(polygon: Any, what: str, height: int, width: int) -> np.ndarray:
    """Return the points of a polygon, fp64 [points, 2] of x and y."""
    if not isinstance(polygon, list) or not all(type(value) in (int, float) for value in polygon):
        raise DataError(f"{what} is not a flat list of coordinates [x0, y0, x1, y1, …]")
    if len(polygon) < 6 or len(polygon) % 2:
        raise DataError(f"{what} has {len(polygon)} coordinates; it needs x and y of at least three points")
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:
        raise DataError(f"{what} leaves the frame: a coordinate has more than 300 digits") from None
    # Written so that NaN is refused as well; annotation tools overshoot the border by up to a pixel.
    if not ((points >= -1).all() and (points <= (width + 1, height + 1)).all()):
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        raise DataError(
            f"{what} leaves the frame: x {left:g} to {right:g}, y {top:g} to {bottom:g}, the frame is "
            f"{width} wide and {height} high; coordinates are pixels of the video's frames"
        )
    return points
