"""InternVL 2.5 to 3.5 (arXiv 2504.10479), in transformers' own form (`OpenGVLab/InternVL3-…-hf`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swim_fast.families.base import Family, Vision
from swim_fast.families.layout import Clip, VisualLayout, join_tiles, shape_only, square_side


class TiledLayout(VisualLayout):
    """One square of tokens a frame; an image is cut to square tiles, behind which the whole comes once more, small.

    The cells of an image are those of its tiles; the small picture has none.
    """

    def prepare(self, kind: str, pixels: np.ndarray, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the tiles; those of a video's frames are `pixel_values` too."""
        inputs = super().prepare(kind, pixels, clip, max_pixels)
        return {**inputs, "tiles": self._tiles(kind, clip)}

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the number of frames or tiles."""
        rows, columns = self._tiles(kind, clip)
        if kind == "video":
            return {"pixel_values_videos": shape_only(1, len(clip.frames), 1), "tiles": (rows, columns)}
        return {"num_patches": [rows * columns + (rows * columns > 1)], "tiles": (rows, columns)}

    def keep(self, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the pixels, [tiles, 3, H, W]."""
        pixels = inputs["pixel_values_videos"][0] if kind == "video" else inputs["pixel_values"]
        return {"pixel_values": pixels}

    def cells(self, kind: str, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Return the tokens of each frame, or of the tiles of an image as they lie in it; see `VisualLayout.cells`."""
        side = square_side(self.processor.image_seq_length, type(self.processor).__name__)
        if kind == "video":
            return visual.view(-1, side, side)
        rows, columns = inputs["tiles"]
        return join_tiles(visual[: rows * columns * side**2], rows, columns, side, side)

    def visual_token(self, kind: str) -> int:
        """Return the id of the token of a feature, the same for image and video."""
        return self.processor.image_token_id

    def tower_grids(self, kind: str, inputs: dict[str, Any], cells: Tensor) -> list[tuple[int, int, int]]:
        """Return the tiles; see `VisualLayout.tower_grids`."""
        side = math.isqrt(self.processor.image_seq_length)
        return [(len(self.keep(kind, inputs)["pixel_values"]), side, side)]

    def _tiles(self, kind: str, clip: Clip) -> tuple[int, int]:
        """Return the rows and columns of tiles that an image is cut to."""
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        if kind == "video" or not self.setting(kind, "crop_to_patches"):
            return 1, 1
        size = self.setting(kind, "size")
        limits = self.setting(kind, "min_patches"), self.setting(kind, "max_patches")
        columns, rows = get_optimal_tiled_canvas((clip.height, clip.width), (size["height"], size["width"]), *limits)
        return rows, columns


def _minimal_pass(model: nn.Module) -> Tensor:
    height, width = model.config.vision_config.image_size
    pixels = torch.zeros(1, 3, height, width, device=model.device)
    return model.model.get_image_features(
        pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output


def _vision(config: Any) -> Vision:
    return Vision.from_config(config.vision_config, patches_per_token=config.downsample_ratio**-2)


FAMILIES = [
    Family(
        name="InternVL",
        model_types=("internvl",),
        processors=("InternVLProcessor",),
        layout=TiledLayout,
        language_model="model.language_model",
        visual="model.vision_tower",
        mergers=("model.multi_modal_projector",),
        minimal_pass=_minimal_pass,
        vision=_vision,
    )
]
