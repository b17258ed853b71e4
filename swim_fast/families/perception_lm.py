"""Perception-LM (arXiv 2504.13180), whose vision tower is one of timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swim_fast.errors import ProcessorError
from swim_fast.families.base import Family, Vision
from swim_fast.families.layout import Clip, VisualLayout, join_tiles, shape_only
from swim_fast.families.sizes import FixedSize, Limits

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class ThumbnailLayout(VisualLayout):
    """One square of tokens a frame; an image comes small and whole, then once more as its tiles, row by row.

    The cells of an image are those of its tiles; the small picture has none, unless it is all there is.
    """

    flattened = ("pixel_values", "pixel_values_videos")

    def find_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return the one size of frames, or of an image's tiles.

        Raises:
            ProcessorError: limits; a way of cutting images, or of cropping frames, that is not known here.
        """
        self.refuse_limits(kind, min_pixels, max_pixels)
        processor = type(self.visual_processor(kind)).__name__
        if kind == "image":
            if (way := self.setting(kind, "vision_input_type")) not in ("thumb+tile", "vanilla"):
                raise ProcessorError(f"{processor} has vision_input_type {way!r}; known are thumb+tile and vanilla")
            side = self.setting(kind, "tile_size")
            return FixedSize(side, side)
        if self.setting(kind, "do_center_crop"):
            raise ProcessorError(f"{processor} has do_center_crop; only frames that are seen as a whole are known here")
        return super().find_limits(kind, None, None)

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the shape of the pixels, and the tiles of an image."""
        rows, columns = self._tiles(clip) if kind == "image" else (1, 1)
        pictures = len(clip.frames) if kind == "video" else self._pictures(rows, columns)
        limits = self.limits[kind]
        return {PIXELS[kind]: shape_only(1, pictures, 3, limits.height, limits.width), "tiles": (rows, columns)}

    def prepare(self, kind: str, pixels: Any, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the frames, or the small picture and the tiles."""
        tiles = self._tiles(clip) if kind == "image" else (1, 1)
        return {**super().prepare(kind, pixels, clip, max_pixels), "tiles": tiles}

    def keep(self, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the pixels, [1, pictures, 3, H, W]."""
        return {PIXELS[kind]: inputs[PIXELS[kind]]}

    def cells(self, kind: str, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Return the tokens of each frame, or of the tiles of an image as they lie in it; see `VisualLayout.cells`."""
        height, width = self._tokens(kind)
        if kind == "video":
            return visual.view(-1, height, width)
        rows, columns = inputs["tiles"]
        return join_tiles(visual[len(visual) - rows * columns * height * width :], rows, columns, height, width)

    def tower_grids(self, kind: str, inputs: dict[str, Any], cells: Tensor) -> list[tuple[int, int, int]]:
        """Return the frames or tiles; see `VisualLayout.tower_grids`."""
        *_, height, width = inputs[PIXELS[kind]].shape
        patch = self.processor.patch_size
        return [(inputs[PIXELS[kind]].shape[1], height // patch, width // patch)]

    def _tokens(self, kind: str) -> tuple[int, int]:
        """Return the rows and columns of tokens of a frame or tile."""
        limits, patch, ratio = self.limits[kind], self.processor.patch_size, self.processor.pooling_ratio
        return limits.height // patch // ratio, limits.width // patch // ratio

    def _tiles(self, clip: Clip) -> tuple[int, int]:
        """Return the rows and columns of tiles that an image is cut to."""
        processor = self.visual_processor("image")
        if self.setting("image", "vision_input_type") == "vanilla" or self.setting("image", "max_num_tiles") == 1:
            return 1, 1
        about = {"img_width": clip.width, "img_height": clip.height, "tile_size": self.limits["image"].height}
        columns, rows = processor._fit_image_to_canvas(**about) or processor._find_closest_aspect_ratio(**about)
        return rows, columns

    def _pictures(self, rows: int, columns: int) -> int:
        return rows * columns + (self.setting("image", "vision_input_type") == "thumb+tile")


def _minimal_pass(model: nn.Module) -> Tensor:
    height, width = model.model.vision_tower.timm_model.patch_embed.img_size
    pixels = torch.zeros(1, 1, 3, height, width, device=model.device)
    return model.model.get_image_features(pixels, return_dict=True).pooler_output


def _vision(config: Any) -> Vision:
    """Read the sizes of timm's model, built without memory for its weights: the configuration names few of them."""
    import timm

    with torch.device("meta"):
        tower = timm.create_model(config.vision_config.architecture, num_classes=0, **config.vision_config.model_args)
    block, patches = tower.blocks[0], tower.patch_embed
    return Vision(
        hidden=tower.embed_dim,
        depth=len(tower.blocks),
        heads=block.attn.num_heads,
        intermediate=block.mlp.fc1.out_features,
        patch_values=patches.proj.in_channels * patches.patch_size[0] * patches.patch_size[1],
        patches_per_token=config.projector_pooling_ratio**2,
        patches_per_cell=1,
    )


FAMILIES = [
    Family(
        name="Perception-LM",
        model_types=("perception_lm",),
        processors=("PerceptionLMProcessor",),
        layout=ThumbnailLayout,
        language_model="model.language_model",
        visual="model.vision_tower",
        mergers=("model.multi_modal_projector",),
        minimal_pass=_minimal_pass,
        vision=_vision,
    )
]
