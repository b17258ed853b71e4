"""VideoLLaMA3 (arXiv 2501.13106)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swim_fast.families.base import Family, Vision
from swim_fast.families.layout import Clip
from swim_fast.families.patched import PIXELS, PatchedLayout
from swim_fast.families.sizes import ClipLimits, Limits, Size


class CompressedLayout(PatchedLayout):
    """Tokens of a frame that hardly differ from those of the frame before are left out; each frame's time is written.

    Which ones are left out is known from the pixels alone: `count` gives the number before that, the most there can be.
    """

    token_types = None

    def find_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return the limits of an image, or of a clip, of which all frames share the most."""
        if kind == "image":
            return super().find_limits(kind, min_pixels, max_pixels)
        processor, size = self.visual_processor(kind), self.setting(kind, "size")
        return ClipLimits(
            factor=processor.patch_size * processor.merge_size,
            temporal_factor=1,
            lowest=0,
            highest=size["longest_edge"],
            frame_lowest=min_pixels or size["shortest_edge"],
            frame_highest=max_pixels,
            capped=None,
            resize=_resize,
        )

    def prepare(self, kind: str, pixels: np.ndarray, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the frames, resized, and which of a video's tokens stay."""
        inputs = super().prepare(kind, pixels, clip, max_pixels)
        processor = self.visual_processor(kind)
        if kind == "video" and self.setting(kind, "use_token_compression"):
            about = (inputs[name] for name in ("video_grid_thw", "video_merge_sizes"))
            inputs["video_compression_mask"] = processor._get_compression_mask(inputs[PIXELS[kind]].patches(), *about)
        return inputs

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the grid of patches, with every token, and the times of the frames."""
        inputs = super().sketch(kind, clip, max_pixels)
        merge = self.patches[kind].merge_size
        inputs[f"{kind}_merge_sizes"] = torch.tensor([merge])
        if kind == "video":
            tokens = int(inputs["video_grid_thw"].prod()) // merge**2
            inputs["video_compression_mask"] = torch.ones(tokens, dtype=torch.bool)
        return inputs

    def cells(self, kind: str, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Return the tokens of each frame, −1 for those left out; see `VisualLayout.cells`."""
        if kind == "image":
            return super().cells(kind, inputs, visual)
        cells = torch.full(self.grid(kind, inputs), -1)
        cells.view(-1)[inputs["video_compression_mask"]] = visual
        return cells


def _resize(num_frames: int, height: int, width: int, factor: int, min_pixels: int, max_pixels: int, **about) -> Size:
    from transformers.models.video_llama_3.video_processing_video_llama_3 import smart_resize

    return smart_resize(height, width, factor, min_pixels // num_frames, max_pixels // num_frames)


def _minimal_pass(model: nn.Module) -> Tensor:
    tower = model.model.vision_model
    values = tower.config.num_channels * tower.config.patch_size**2
    pixels = torch.zeros(1, values, dtype=tower.dtype, device=tower.device)
    grid, merge = torch.ones(1, 3, dtype=torch.long), torch.ones(1, dtype=torch.long)
    return model.model.projector(tower(pixels, grid.to(tower.device), merge.to(tower.device)).last_hidden_state)


def _vision(config: Any) -> Vision:
    return Vision.from_config(config.vision_config, patches_per_token=4)  # of a video; an image's are not merged


FAMILIES = [
    Family(
        name="VideoLLaMA3",
        model_types=("video_llama_3",),
        processors=("VideoLlama3Processor",),
        layout=CompressedLayout,
        language_model="model.language_model",
        visual="model.vision_model",
        mergers=("model.projector",),
        minimal_pass=_minimal_pass,
        vision=_vision,
    )
]
