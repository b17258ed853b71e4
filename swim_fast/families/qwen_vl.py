"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swim_fast.families.base import Family, Vision
from swim_fast.families.layout import Clip
from swim_fast.families.patched import ClipLimitedLayout, PatchedLayout, minimal_patches, seconds_per_patch
from swim_fast.families.sizes import Size


class Seconds:
    """Time between the temporal patches of each video of a batch, exact whatever becomes of the batch's tensors.

    Trainers under DeepSpeed cast every tensor of floats to bf16, those in lists and dictionaries too, and 1.999 s would
    become 2 s. Qwen2.5-VL iterates over numbers, the Omni models take the tensor at an index; both are given here.
    """

    def __init__(self, values: Sequence[float]):
        self.values = tuple(values)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)

    def __getitem__(self, index: int) -> Tensor:
        """Return the time of a video, fp32 []."""
        return torch.tensor(self.values[index], dtype=torch.float32)

    def __repr__(self) -> str:
        return f"Seconds({list(self.values)})"


class TimedLayout(PatchedLayout):
    """Qwen2.5-VL's layout: the model is told how far temporal patches are apart, in seconds."""

    seconds = "second_per_grid_ts"

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return the grid of patches and their distance in time."""
        inputs = super().sketch(kind, clip, max_pixels)
        if kind == "video":
            seconds = seconds_per_patch(clip, self.frames_per_patch)
            inputs[self.seconds] = torch.tensor([seconds], dtype=torch.float32)
        return inputs

    @classmethod
    def join(cls, name: str, values: list[Tensor]) -> Any:
        """Join an input of several samples: tensors to one, and times to `Seconds`; see `VisualLayout.join`."""
        return Seconds(torch.cat(values).tolist()) if name == cls.seconds else super().join(name, values)


class StampedLayout(ClipLimitedLayout):
    """Qwen3-VL's layout: each temporal patch has a text of its time before it."""

    @staticmethod
    def resize(**about: Any) -> Size:
        """Return the size of a frame as the processor chooses it."""
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        return smart_resize(**about)


def _minimal_pass(model: nn.Module) -> Tensor:
    return minimal_patches(model.model.visual)


def vision_of(config: Any) -> Vision:
    """Return the sizes of a tower of Qwen2-VL's kind."""
    vision = config.vision_config
    width = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's hidden_size is the language model's
    full = getattr(vision, "fullatt_block_indexes", None)
    return Vision(
        hidden=width,
        depth=vision.depth,
        heads=vision.num_heads,
        intermediate=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        patches_per_token=vision.spatial_merge_size**2,
        full_blocks=None if full is None else len(full),
        window=getattr(vision, "window_size", vision.patch_size) // vision.patch_size,
    )


_PARTS: dict[str, Any] = {
    "language_model": "model.language_model",
    "visual": "model.visual",
    "numbering": "model",
    "minimal_pass": _minimal_pass,
    "vision": vision_of,
    "frames_apart": True,
}

FAMILIES = [
    Family(
        name="Qwen2-VL",
        model_types=("qwen2_vl",),
        processors=("Qwen2VLProcessor",),
        layout=PatchedLayout,
        mergers=("model.visual.merger",),
        pretraining_rule=True,
        **_PARTS,
    ),
    Family(
        name="Qwen2.5-VL",
        model_types=("qwen2_5_vl",),
        processors=("Qwen2_5_VLProcessor",),
        layout=TimedLayout,
        mergers=("model.visual.merger",),
        pretraining_rule=True,
        **_PARTS,
    ),
    Family(
        name="Qwen3-VL",
        model_types=("qwen3_vl", "qwen3_vl_moe"),
        processors=("Qwen3VLProcessor",),
        layout=StampedLayout,
        mergers=("model.visual.merger", "model.visual.deepstack_merger_list"),
        **_PARTS,
    ),
]
