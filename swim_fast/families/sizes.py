"""Sizes in pixels that a processor gives to the frames of a clip, or to an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class PixelLimits:
    """Sizes of Qwen2-VL's kind: both sides multiples of `factor`, height · width of a frame between two limits.

    Attributes:
        factor: pixels of a token's side.
        lowest, highest: pixels of a frame; kept as far as its shape allows.
        shared: pixels that all frames share, which lower `highest` where they are many; None: no such limit.
    """

    factor: int
    lowest: int
    highest: int
    shared: int | None = None

    def range(self, frames: int) -> tuple[int, int]:
        """Return the least and most pixels of a frame of a clip of so many."""
        if self.shared is None:
            return self.lowest, self.highest
        return self.lowest, max(min(self.highest, self.shared // frames), int(self.lowest * 1.05))

    def size(self, frames: int, height: int, width: int, highest: int | None = None) -> Size:
        """Return the size of a frame after resizing.

        Args:
            frames: of the clip; 1 for an image.
            height, width: size of a frame before.
            highest: most pixels of a frame, in place of those of `range`.

        Raises:
            ValueError: a shape that the processor does not take.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        own_lowest, own_highest = self.range(frames)
        return smart_resize(height, width, self.factor, own_lowest, own_highest if highest is None else highest)


@dataclass(frozen=True)
class ClipLimits:
    """Sizes of Qwen3-VL's kind, whose limits are those of all frames of a clip together.

    Attributes:
        factor: pixels of a token's side.
        temporal_factor: frames of a temporal patch.
        lowest, highest: pixels of the clip.
        frame_lowest, frame_highest: pixels of a frame, in place of those; None: as the clip's.
        capped: pixels of a frame that `highest` may not exceed; None: no such limit.
        resize: the processor's own (num_frames, height, width, temporal_factor, factor, min_pixels, max_pixels).
    """

    factor: int
    temporal_factor: int
    lowest: int
    highest: int
    frame_lowest: int | None
    frame_highest: int | None
    capped: int | None
    resize: Callable[..., Size]

    def range(self, frames: int) -> tuple[int, int]:
        """Return the least and most pixels of a frame of a clip of so many."""
        lowest, highest = self._totals(frames)
        return lowest // frames, highest // frames

    def size(self, frames: int, height: int, width: int, highest: int | None = None) -> Size:
        """Return the size of a frame after resizing; arguments and errors as for `PixelLimits.size`."""
        least, most = self._totals(frames)
        most = most if highest is None else highest * frames
        return self.resize(
            num_frames=frames,
            height=height,
            width=width,
            temporal_factor=self.temporal_factor,
            factor=self.factor,
            min_pixels=least,
            max_pixels=most,
        )

    def _totals(self, frames: int) -> tuple[int, int]:
        lowest = self.lowest if self.frame_lowest is None else self.frame_lowest * frames
        if self.frame_highest is not None:
            return lowest, self.frame_highest * frames
        if self.capped is None:
            return lowest, self.highest
        return lowest, max(min(self.capped, self.highest // frames), int(lowest * 1.05)) * frames


@dataclass(frozen=True)
class FixedSize:
    """Return the fixed size that a processor gives to every frame."""

    height: int
    width: int

    def range(self, frames: int) -> tuple[int, int]:
        """Return the pixels of a frame, twice: there is no choice."""
        return self.height * self.width, self.height * self.width

    def size(self, frames: int, height: int, width: int, highest: int | None = None) -> Size:
        """Return the size of a frame after resizing, whatever it was."""
        return self.height, self.width


Limits = PixelLimits | ClipLimits | FixedSize
