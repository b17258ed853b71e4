"""Qwen2.5-Omni (arXiv 2503.20215) and Qwen3-Omni (arXiv 2509.17765): their thinkers, which see, hear and write.

Sound is not trained on: no record has any, and the audio tower is frozen.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from swim_fast.families.base import Family
from swim_fast.families.patched import minimal_patches
from swim_fast.families.qwen_vl import TimedLayout, vision_of


class ThinkerLayout(TimedLayout):
    """Qwen2.5-VL's layout without types of tokens, and with another name for the time."""

    token_types = None
    seconds = "video_second_per_grid"

    def expand(self, kind: str, inputs: dict[str, Any]) -> str:
        """Return as many visual tokens as there are cells: the processor has no such function."""
        time, height, width = self.grid(kind, inputs)
        return self.placeholder(kind) * (time * height * width)


# transformers from 5.21 on holds towers and decoder in one module, as it does of other families
_NESTED = Version(importlib.metadata.version("transformers")) >= Version("5.21")
_BASE = "model." if _NESTED else ""
_VISUAL = f"{_BASE}visual"


def _minimal_pass(model: nn.Module) -> Tensor:
    return minimal_patches(model.get_submodule(_VISUAL))


_PARTS: dict[str, Any] = {
    "layout": ThinkerLayout,
    "language_model": "model.language_model" if _NESTED else "model",
    "visual": _VISUAL,
    "unused": lambda model: (f"{_BASE}audio_tower",),
    "minimal_pass": _minimal_pass,
    "vision": vision_of,
    "frames_apart": True,
    "packable": False,  # its positions depend on sound, too, and are made in the model
}

FAMILIES = [
    Family(
        name="Qwen2.5-Omni",
        model_types=("qwen2_5_omni_thinker",),
        processors=("Qwen2_5OmniProcessor",),
        mergers=(f"{_VISUAL}.merger",),
        **_PARTS,
    ),
    Family(
        name="Qwen3-Omni",
        model_types=("qwen3_omni_moe_thinker",),
        processors=("Qwen3OmniMoeProcessor",),
        mergers=(f"{_VISUAL}.merger", f"{_VISUAL}.merger_list"),
        **_PARTS,
    ),
]
