"""SmolVLM2 (arXiv 2504.05299)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from swim_fast.errors import ProcessorError
from swim_fast.families.base import Family, Vision
from swim_fast.families.layout import Clip, VisualLayout, join_tiles, shape_only, square_side
from swim_fast.families.sizes import FixedSize, Limits

PIXELS = ("pixel_values", "pixel_attention_mask")  # of images and of the frames of videos alike


class SplitLayout(VisualLayout):
    """One square of tokens a frame, its time before it; an image is cut to tiles, and comes small and whole at the end.

    The cells of an image are those of its tiles; the small picture has none, unless it is all there is.
    """

    padded = PIXELS

    def find_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return the one size of frames, or of an image's tiles.

        Raises:
            ProcessorError: limits; images that are resized to no whole number of tiles.
        """
        self.refuse_limits(kind, min_pixels, max_pixels)
        side = self.setting(kind, "max_image_size")["longest_edge"]
        longest = self.setting(kind, "size").get("longest_edge")
        if kind == "image" and self.setting(kind, "do_image_splitting") and (longest is None or longest % side):
            raise ProcessorError(
                f"{type(self.visual_processor(kind)).__name__} resizes images to {self.setting(kind, 'size')} and cuts "
                f"tiles of {side}; only a longest edge of whole tiles is known here"
            )
        return FixedSize(side, side)

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the number and times of frames, or the rows and columns of tiles."""
        if kind == "video":
            return {"pixel_values": shape_only(1, len(clip.frames), 1), "video_metadata": [clip.metadata()]}
        _, rows, columns = self.visual_processor(kind).get_number_of_image_patches(clip.height, clip.width)
        return {"rows": [[rows]], "cols": [[columns]]}

    def keep(self, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the pixels, [1, pictures, 3, H, W], and their mask."""
        return {name: inputs[name] for name in PIXELS if name in inputs}

    def cells(self, kind: str, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Return the tokens of each frame, or of the tiles of an image as they lie in it; see `VisualLayout.cells`."""
        side = square_side(self.processor.image_seq_len, type(self.processor).__name__)
        if kind == "video":
            return visual.view(-1, side, side)
        rows, columns = (max(int(inputs[name][0][0]), 1) for name in ("rows", "cols"))
        return join_tiles(visual[: rows * columns * side**2], rows, columns, side, side)

    def visual_token(self, kind: str) -> int:
        """Return the id of the token of a feature, the same for image and video."""
        return self.processor.image_token_id

    def tower_grids(self, kind: str, inputs: dict[str, Any], cells: Tensor) -> list[tuple[int, int, int]]:
        """Return the frames or tiles; see `VisualLayout.tower_grids`."""
        side = math.isqrt(self.processor.image_seq_len)
        return [(inputs["pixel_values"].shape[1], side, side)]


def _minimal_pass(model: nn.Module) -> Tensor:
    side = model.config.vision_config.image_size
    pixels = torch.ones(1, 1, 3, side, side, device=model.device)  # the model leaves out pictures of zeros
    found = model.model.get_image_features(pixels, return_dict=True).pooler_output
    return torch.cat([features.flatten() for features in found])


def _vision(config: Any) -> Vision:
    return Vision.from_config(config.vision_config, patches_per_token=config.scale_factor**2)


FAMILIES = [
    Family(
        name="SmolVLM2",
        model_types=("smolvlm",),
        processors=("SmolVLMProcessor",),
        layout=SplitLayout,
        language_model="model.text_model",
        visual="model.vision_model",
        mergers=("model.connector",),
        minimal_pass=_minimal_pass,
        vision=_vision,
        cacheless=True,
    )
]
