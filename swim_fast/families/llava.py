"""LLaVA-OneVision (arXiv 2408.03326) and LLaVA-NeXT-Video, which continues LLaVA-1.5 (arXiv 2310.03744)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from swim_fast.errors import ProcessorError
from swim_fast.families.base import Family, Vision
from swim_fast.families.layout import Clip, VisualLayout, shape_only, square_side
from swim_fast.families.sizes import Limits


class AnyResolutionLayout(VisualLayout):
    """One square of tokens a frame; an image comes small and whole, then once more as the rows of its tiles.

    The tiles' tokens are those of the image without the padding around it, a newline token behind each row. They are
    its cells; the small picture and the newlines have none. (The edge of the padding is rounded to whole tokens.)
    """

    padded = ("pixel_values",)

    def __init__(self, processor: Any, min_pixels: int | None = None, max_pixels: int | None = None):
        super().__init__(processor, min_pixels, max_pixels)
        for kind in self.kinds:
            self.side(kind)  # said now rather than of every record

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the shape of the pixels, and an image's size."""
        limits = self.limits[kind]
        shape = shape_only(1, len(clip.frames), 3, limits.height, limits.width)
        if kind == "video":
            return {"pixel_values_videos": shape}
        return {"pixel_values": shape, "image_sizes": [[clip.height, clip.width]], "batch_num_images": [1]}

    def cells(self, kind: str, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Return the tokens of an image's tiles, as they lie in it; see `VisualLayout.cells`."""
        if kind == "video":
            raise NotImplementedError
        rows, columns = self._image_grid(*map(int, inputs["image_sizes"][0]))
        return visual[len(visual) - rows * (columns + 1) :].view(1, rows, columns + 1)[..., :-1]

    def tower_grids(self, kind: str, inputs: dict[str, Any], cells: Tensor) -> list[tuple[int, int, int]]:
        """Return the frames or tiles; see `VisualLayout.tower_grids`."""
        pixels = inputs["pixel_values_videos" if kind == "video" else "pixel_values"]
        return [(pixels.shape[1], self.side(kind), self.side(kind))]

    def side(self, kind: str) -> int:
        """Return the patches along the side of a frame or tile.

        Raises:
            ProcessorError: it is no square.
        """
        raise NotImplementedError

    def _image_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of tokens of an image."""
        from transformers.image_processing_utils import select_best_resolution

        side, tile = self.side("image"), self.limits["image"]
        size = select_best_resolution([height, width], self.setting("image", "image_grid_pinpoints"))
        tiles = size[0] // tile.height, size[1] // tile.width
        cells, rows = self.processor._get_unpadded_features(height, width, side, side, *tiles)
        return rows, cells // rows


class OneVisionLayout(AnyResolutionLayout):
    """LLaVA-OneVision's layout: frames are pooled by 2, and one newline token is behind the last."""

    def cells(self, kind: str, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Return the tokens of each frame, or of an image; see `VisualLayout.cells`."""
        if kind == "image":
            return super().cells(kind, inputs, visual)
        side = math.ceil(self.side(kind) / 2)
        return visual[:-1].view(-1, side, side)

    def side(self, kind: str) -> int:
        """Return the patches along the side of a frame or tile; errors as for `AnyResolutionLayout.side`."""
        without = self.processor.vision_feature_select_strategy == "default"  # the tower's first token
        return square_side(self.processor.num_image_tokens - without, type(self.processor).__name__)


class CroppedLayout(AnyResolutionLayout):
    """LLaVA-NeXT-Video's layout: the model sees the middle of a frame, as a square, pooled by 2."""

    flattened = ("pixel_values_videos",)

    def find_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return the one size of frames, or of an image's tiles.

        Raises:
            ProcessorError: as for the class; frames whose shorter side is not resized to the side of the crop.
        """
        limits = super().find_limits(kind, min_pixels, max_pixels)
        size, crop = self.setting(kind, "size"), self.setting(kind, "crop_size")
        sides = (crop["height"], crop["width"]) if self.setting(kind, "do_center_crop") else None
        if sides != (limits.height, limits.width) or (kind == "video" and not size.get("shortest_edge")):
            raise ProcessorError(
                f"{type(self.visual_processor(kind)).__name__} resizes {kind}s to {dict(size)} and crops {sides}; only "
                "a crop of the side that the shorter one is resized to is known here"
            )
        return limits

    def view(self, kind: str, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the square in the middle of a frame; see `VisualLayout.view`. Images are seen as a whole."""
        if kind == "image":
            return super().view(kind, height, width)
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return top, top + side, left, left + side

    def cells(self, kind: str, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Return the tokens of each frame, or of an image; see `VisualLayout.cells`."""
        if kind == "image":
            return super().cells(kind, inputs, visual)
        side = self.side(kind) // 2
        return visual.view(-1, side, side)

    def side(self, kind: str) -> int:
        """Return the patches along the side of a frame or tile.

        Raises:
            ProcessorError: an odd number along a frame, which has no place for the pooled tokens.
        """
        side = self.limits[kind].height // self.processor.patch_size
        if kind == "video" and side % 2:
            raise ProcessorError(f"frames of {side} × {side} patches, which cannot be pooled by 2")
        return side


def _minimal_pass(model: nn.Module) -> Tensor:
    vision = model.config.vision_config
    pixels = torch.zeros(1, 1, vision.num_channels, vision.image_size, vision.image_size, device=model.device)
    (features,) = model.model.get_video_features(pixels, return_dict=True).pooler_output
    return features


def unused_of_tower(tower: nn.Module, path: str, layer: int | list[int]) -> tuple[str, ...]:
    """Return what of a CLIP or SigLIP tower is not needed for the output of some of its layers.

    Args:
        tower: the tower, which is at `path` in the model.
        layer: index of one output or several, 0 for the first layer's input, negative ones from the end.
    """
    depth = len(tower.encoder.layers)
    needed = max(one % (depth + 1) for one in ([layer] if isinstance(layer, int) else layer))
    behind = [f"encoder.layers.{index}" for index in range(needed, depth)]
    behind += [name for name in ("post_layernorm", "head") if hasattr(tower, name)]
    return tuple(f"{path}.{name}" for name in behind)


def _unused(model: nn.Module) -> tuple[str, ...]:
    return unused_of_tower(model.model.vision_tower, "model.vision_tower", model.config.vision_feature_layer)


def _vision(config: Any) -> Vision:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    pooled = side**2 / math.ceil(side / 2) ** 2  # of a video; an image's are not pooled
    return Vision.from_config(vision, patches_per_token=pooled, patches_per_cell=1)


_PARTS: dict[str, Any] = {
    "language_model": "model.language_model",
    "visual": "model.vision_tower",
    "merger_parameters": ("model.image_newline",),
    "minimal_pass": _minimal_pass,
    "vision": _vision,
    "unused": _unused,
}

FAMILIES = [
    Family(
        name="LLaVA-OneVision",
        model_types=("llava_onevision",),
        processors=("LlavaOnevisionProcessor",),
        layout=OneVisionLayout,
        mergers=("model.multi_modal_projector",),
        **_PARTS,
    ),
    Family(
        name="LLaVA-NeXT-Video",
        model_types=("llava_next_video",),
        processors=("LlavaNextVideoProcessor",),
        layout=CroppedLayout,
        mergers=("model.multi_modal_projector", "model.vision_resampler"),
        **_PARTS,
    ),
]
