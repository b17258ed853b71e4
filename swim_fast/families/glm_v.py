"""GLM-4.1V, GLM-4.5V and GLM-4.6V (arXiv 2507.01006)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from swim_fast.families.base import Family, Vision
from swim_fast.families.patched import ClipLimitedLayout, minimal_patches
from swim_fast.families.sizes import Size


class ImageTokenLayout(ClipLimitedLayout):
    """Each temporal patch of a video is written as an image, followed by its second.

    An image is resized as if it were the frames of one temporal patch.
    """

    clip_kinds = ("image", "video")

    @staticmethod
    def resize(num_frames: int, temporal_factor: int, **about: Any) -> Size:
        """Return the size of a frame as the processor chooses it."""
        from transformers.models.glm4v.image_processing_glm4v import smart_resize

        return smart_resize(num_frames=max(num_frames, temporal_factor), temporal_factor=temporal_factor, **about)

    def visual_token(self, kind: str) -> int:
        """Return the id of the token of a feature, the same for image and video."""
        return self.processor.image_token_id


def _minimal_pass(model: nn.Module) -> Tensor:
    return minimal_patches(model.model.visual)


def _vision(config: Any) -> Vision:
    vision = config.vision_config
    return Vision(
        hidden=vision.hidden_size,
        depth=vision.depth,
        heads=vision.num_heads,
        intermediate=vision.out_hidden_size,  # of a block's MLP; intermediate_size is the merger's
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        patches_per_token=vision.spatial_merge_size**2,
    )


FAMILIES = [
    Family(
        name="GLM-4V",
        model_types=("glm4v", "glm4v_moe", "glm46v"),
        processors=("Glm4vProcessor", "Glm46VProcessor"),
        layout=ImageTokenLayout,
        language_model="model.language_model",
        visual="model.visual",
        mergers=("model.visual.downsample", "model.visual.merger"),
        numbering="model",
        minimal_pass=_minimal_pass,
        vision=_vision,
        frames_apart=True,
    )
]
