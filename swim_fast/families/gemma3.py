"""Gemma 3 (arXiv 2503.19786), which takes images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from swim_fast.errors import ProcessorError
from swim_fast.families.base import Family, Vision
from swim_fast.families.layout import Clip, VisualLayout, square_side
from swim_fast.families.sizes import Limits


class SquareLayout(VisualLayout):
    """One square of tokens an image, which see each other; crops beside it (pan and scan) are refused."""

    kinds = ("image",)
    token_types = "token_type_ids"

    def find_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return the one size of images.

        Raises:
            ProcessorError: limits, or crops.
        """
        if self.options(kind).get("do_pan_and_scan") or self.visual_processor(kind).do_pan_and_scan:
            raise ProcessorError(
                f"{type(self.visual_processor(kind)).__name__} has do_pan_and_scan, which shows parts of an image "
                "twice: where each token lies is not known; set it to false in the processor's configuration"
            )
        return super().find_limits(kind, min_pixels, max_pixels)

    def visual_token(self, kind: str) -> int:
        """Return the id of the token of a feature; the placeholder is the token that begins an image."""
        return self.processor.tokenizer.image_token_id

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return that there are no crops."""
        return {"num_crops": [0]}

    def keep(self, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the pixels, [1, 3, H, W]."""
        return {"pixel_values": inputs["pixel_values"]}

    def grid(self, kind: str, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """Return one picture, its rows and columns."""
        side = square_side(self.processor.image_seq_length, type(self.processor).__name__)
        return 1, side, side


def _minimal_pass(model: nn.Module) -> Tensor:
    side = model.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side, device=model.device)
    return model.model.get_image_features(pixels, return_dict=True).pooler_output


def _unused(model: nn.Module) -> tuple[str, ...]:
    return ("model.vision_tower.head",) if hasattr(model.model.vision_tower, "head") else ()


def _vision(config: Any) -> Vision:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // math.isqrt(config.mm_tokens_per_image)
    return Vision.from_config(vision, patches_per_token=side**2)


FAMILIES = [
    Family(
        name="Gemma 3",
        model_types=("gemma3",),
        processors=("Gemma3Processor",),
        layout=SquareLayout,
        language_model="model.language_model",
        visual="model.vision_tower",
        mergers=("model.multi_modal_projector",),
        minimal_pass=_minimal_pass,
        vision=_vision,
        unused=_unused,
    )
]
