"""Masks of other formats: PNG files, run-length codes and polygons, all to COCO's compressed run-length code."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import decode_segmentation

MAX_PIXELS = 1 << 28  # of a frame: far more than any camera's
VOID = 255  # DAVIS marks pixels that count for no object with it


class Masks:
    """Masks of one noun: frame index -> union of all masks that were added there. Empty masks are left out."""

    def __init__(self) -> None:
        self._codes: dict[int, list[dict]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, frame: int, mask: np.ndarray | None) -> None:
        """Add a mask [H, W], nonzero where the object is; None and an empty one add nothing."""
        from pycocotools import mask as coco

        if mask is not None and mask.any():
            self._codes[frame].append(coco.encode(np.asfortranarray(mask != 0, dtype=np.uint8)))

    def add_code(self, frame: int, segmentation: Any, height: int, width: int) -> None:
        """Add a run-length code or polygons of frames of a size; null and what marks nothing adds nothing.

        Raises:
            DataError: it does not decode, or is meant for another size.
        """
        mask = decode(segmentation, height, width)
        if mask is not None and isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str):
            self._codes[frame].append({"size": mask.shape, "counts": segmentation["counts"].encode()})  # it is one
        else:
            self.add(frame, mask)

    @property
    def frames(self) -> set[int]:
        """Indices of the frames that have a mask."""
        return set(self._codes)

    def update(self, other: Masks) -> None:
        """Add the masks of another one."""
        for frame, codes in other._codes.items():
            self._codes[frame] += codes

    def annotation(self) -> dict[str, dict]:
        """Return `{"frame index": {"segmentation": {"size": [H, W], "counts": …}}}`, frames in order.

        Raises:
            DataError: masks of one frame that differ in size.
        """
        from pycocotools import mask as coco

        found = {}
        for frame, codes in sorted(self._codes.items()):
            if len({tuple(code["size"]) for code in codes}) > 1:
                sizes = " and ".join(sorted({str(list(code["size"])) for code in codes}))
                raise DataError(f"masks of frame {frame} differ in size: {sizes} [height, width]; make them one size")
            code = coco.merge(codes)
            size = [int(side) for side in code["size"]]
            found[str(frame)] = {"segmentation": {"size": size, "counts": code["counts"].decode("ascii")}}
        return found


def decode(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """Decode a run-length code or polygons given for frames of a size: uint8 [H, W], None where nothing is marked.

    Raises:
        DataError: it does not decode, or is meant for another size.
    """
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"frames of {height} x {width} (height x width) are not possible; correct the size")
    return decode_segmentation(segmentation, height, width)


def place(part: np.ndarray, left: int, top: int, height: int, width: int) -> np.ndarray:
    """Return a mask [height, width] with a part of it at its place.

    Raises:
        DataError: it leaves the frame.
    """
    mask = np.zeros((height, width), np.uint8)
    bottom, right = top + part.shape[0], left + part.shape[1]
    if top < 0 or left < 0 or bottom > height or right > width:
        text = f"x {left} to {right}, y {top} to {bottom}, the frame is {width} wide and {height} high"
        raise DataError(f"its mask leaves the frame: {text}")
    mask[top:bottom, left:right] = part
    return mask


def read_labels(path: Path) -> np.ndarray:
    """Read a PNG of object numbers (a palette or grey image): uint8 [H, W], 0 where no object is.

    255 is void, except in a grey image without another number, which shows one object: 1.

    Raises:
        DataError: the file cannot be read, or holds colours instead of numbers.
    """
    mode, values = _read(path)
    if mode != "P" and not np.any((values != 0) & (values != VOID)):
        return (values != 0).astype(np.uint8)
    values[values == VOID] = 0
    return values


def read_mask(path: Path) -> np.ndarray:
    """Read a PNG of one object: bool [H, W].

    Every number of a palette image and of a grey one up to 254 counts; a grey image that reaches 255 is cut at 128.

    Raises:
        DataError: the file cannot be read, or holds colours.
    """
    mode, values = _read(path)
    return values >= 128 if mode == "L" and VOID in values else values > 0


def _read(path: Path) -> tuple[str, np.ndarray]:
    """Return the mode of an image (1, L or P) and its numbers, uint8 [H, W]."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); restore the file") from None
    if mode == "RGB" and (values == values[..., :1]).all():
        return "L", np.ascontiguousarray(values[..., 0])
    if mode not in ("1", "L", "P"):
        raise DataError(f"{path} is a {mode} image, not one of object numbers (palette or grey); convert it")
    return mode, values.astype(np.uint8)
