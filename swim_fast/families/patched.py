"""Layout of processors that cut frames of any size to patches, as Qwen2-VL's does; many families have followed it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim_fast.errors import ProcessorError
from swim_fast.families.layout import Clip, VisualLayout
from swim_fast.families.patches import PackedFrames, PatchLayout
from swim_fast.families.sizes import ClipLimits, Limits, PixelLimits, Size

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # the model's name of the pixels


class PatchedLayout(VisualLayout):
    """Frames resized to multiples of a token's side; the patches are made on the model's device."""

    token_types = "mm_token_type_ids"

    def __init__(self, processor: Any, min_pixels: int | None = None, max_pixels: int | None = None):
        super().__init__(processor, min_pixels, max_pixels)
        self.patches = {kind: PatchLayout.from_processor(self.visual_processor(kind)) for kind in self.kinds}
        self.frames_per_patch = self.visual_processor("video").temporal_patch_size
        if self.frames_per_patch not in (1, 2):
            raise ProcessorError(f"a temporal patch of {self.frames_per_patch} frames; only 1 and 2 are supported")

    def find_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return the limits of a frame. Errors as for the class."""
        processor, size = self.visual_processor(kind), self.setting(kind, "size")
        lowest, highest = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        _check_limits(processor, lowest, highest)
        factor, shared = processor.patch_size * processor.merge_size, None
        if getattr(processor, "cap_pixels_per_frame", False):  # 0.9 is the processor's
            shared = int(processor.max_video_tokens * factor**2 * 0.9) * processor.temporal_patch_size
        return PixelLimits(factor, lowest, highest, shared)

    def prepare(self, kind: str, pixels: np.ndarray, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the frames, resized; see `VisualLayout.prepare`. Those that have their size already stay.

        `pixels` may be of some frames of the clip alone, or none; the grid is the whole clip's.
        """
        resize = self.resizer(kind, clip, max_pixels)
        if len(pixels) and pixels.shape[1:3] != self.size(kind, clip, max_pixels):
            pixels = np.stack([resize(frame) for frame in pixels])
        return {PIXELS[kind]: PackedFrames.of(pixels, self.patches[kind]), **self.sketch(kind, clip, max_pixels)}

    def resizer(self, kind: str, clip: Clip, max_pixels: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
        """Return what resizes a frame to `size`; errors as for that."""
        return functools.partial(self.patches[kind].resize, size=self.size(kind, clip, max_pixels))

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the grid of patches, and the times of the frames."""
        grid = self.patches[kind].grid(len(clip.frames), *self.size(kind, clip, max_pixels))
        inputs: dict[str, Any] = {f"{kind}_grid_thw": torch.tensor([grid])}
        return inputs | ({"video_metadata": [clip.metadata()]} if kind == "video" else {})

    def size(self, kind: str, clip: Clip, max_pixels: int | None = None) -> Size:
        """Return the size that the frames of a clip are given. Errors as for `PixelLimits.size`."""
        return self.limits[kind].size(len(clip.frames), clip.height, clip.width, max_pixels)

    def keep(self, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that the model's forward takes."""
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor | PackedFrames)}

    def grid(self, kind: str, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """Return the temporal patches, and the grid of each that merging leaves."""
        time, height, width = inputs[f"{kind}_grid_thw"][0].tolist()
        merge = self.patches[kind].merge_size
        return time, height // merge, width // merge


class ClipLimitedLayout(PatchedLayout):
    """The same with limits on the pixels of a whole clip, as in Qwen3-VL's processor.

    Attributes:
        resize: the processor's choice of a size, see `ClipLimits`.
    """

    resize: Callable[..., Size]
    clip_kinds: tuple[str, ...] = ("video",)

    def find_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return the limits of a clip; `min_pixels` and `max_pixels` are of a frame in any case."""
        if kind not in self.clip_kinds:
            return super().find_limits(kind, min_pixels, max_pixels)
        processor, size = self.visual_processor(kind), self.setting(kind, "size")
        factor = processor.patch_size * processor.merge_size
        if min_pixels is not None and max_pixels is not None:
            _check_limits(processor, min_pixels, max_pixels)
        capped = processor.max_video_tokens * factor**2 if getattr(processor, "cap_pixels_per_frame", False) else None
        return ClipLimits(
            factor=factor,
            temporal_factor=processor.temporal_patch_size,
            lowest=size["shortest_edge"],
            highest=size["longest_edge"],
            frame_lowest=min_pixels,
            frame_highest=max_pixels,
            capped=capped,
            resize=type(self).resize,
        )


def _check_limits(processor: Any, lowest: int, highest: int) -> None:
    if lowest > highest:
        raise ProcessorError(
            f"min_pixels {lowest} is above max_pixels {highest}, one of which is {type(processor).__name__}'s own; "
            "give both"
        )


def seconds_per_patch(clip: Clip, frames_per_patch: int) -> float:
    """Return the time from one temporal patch to the next, in seconds, of the frames that were really sampled.

    The model knows one spacing per video, so for frames that are not uniformly spaced it is the mean spacing: the time
    covered by n distinct frames, each lasting until the next one, over n, times the frames of a patch. Repeated padding
    frames take no time. A single frame lasts 1 / fps.

    It is handed over exactly. `swim_fast.position_ids`, as transformers 5.17 itself, then cuts it to whole seconds, so
    that patches less than a second apart share one temporal position. transformers from 5.18 on cuts positions instead
    (https://github.com/huggingface/transformers/pull/48669).
    """
    distinct = sorted(set(clip.frames))
    spacing = (distinct[-1] - distinct[0]) / (len(distinct) - 1) if len(distinct) > 1 else 1
    return frames_per_patch * spacing / clip.fps


def minimal_patches(visual: Any) -> Tensor:
    """Return the features of one token's patches, all zero."""
    config = visual.config
    merge = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.zeros(merge * merge, width, dtype=visual.dtype, device=visual.device)
    found = visual(pixels, grid_thw=torch.tensor([[1, merge, merge]], device=visual.device))
    # Qwen3-VL's tower answers features for some layers of the decoder, too
    return torch.cat(
        [found.pooler_output.flatten(), *(part.flatten() for part in found.get("deepstack_features") or ())]
    )
