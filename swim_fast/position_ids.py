"""Position ids by the rule with which Qwen2.5-VL was pretrained.

A visual token has three positions: time, height, width (M-RoPE, arXiv 2409.12191). By the rule of pretraining the text
goes on after the largest of them. transformers from 5.3 on lets it go on after the grid's longer side and forgets time,
so that text after a long clip gets positions that the model never saw there: after 120 s in 32 frames the first text
token stands at 38 instead of 226, in the midst of the video.

Seconds per patch are cut to whole seconds before they become positions, as transformers 4.57 to 5.17 do it, whatever
the installed release does: from 5.18 on, positions are cut instead.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def rope_index_function(model: nn.Module, rule: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function f(model, …) that numbers the tokens by a rule, with the arguments of `get_rope_index`.

    Args:
        model: has transformers' `get_rope_index`, such as `Qwen2_5_VLModel`.
        rule: `pretraining` or `library`, see `swim_fast.options.Weights`.
    """
    return compute_rope_index if rule == "pretraining" else type(model).get_rope_index


def compute_rope_index(
    model: nn.Module,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Number the tokens by the rule of pretraining; stands in for `get_rope_index` of a model of transformers.

    Args:
        model: of whose class the library's own numbers are taken. The others: as transformers has them.

    Returns:
        Positions, int64 [3, B, L], 0 where the mask is; and [B, 1], what is added to the index of a later token.
    """
    if second_per_grid_ts is not None:
        second_per_grid_ts = [int(seconds) for seconds in second_per_grid_ts]
    positions, deltas = type(model).get_rope_index(
        model,
        input_ids,
        mm_token_type_ids,
        image_grid_thw=image_grid_thw,
        video_grid_thw=video_grid_thw,
        second_per_grid_ts=second_per_grid_ts,
        attention_mask=attention_mask,
        **kwargs,
    )
    for row, types in enumerate(mm_token_type_ids):
        real = slice(None) if attention_mask is None else attention_mask[row].bool()
        positions[:, row, real] = continue_after_visual(positions[:, row, real], types[real])
        deltas[row] = positions[:, row, real].max() + 1 - len(types[real])
    return positions, deltas


def continue_after_visual(positions: Tensor, types: Tensor) -> Tensor:
    """Shift what stands behind each video or image, so that it goes on after the largest position of that.

    Args:
        positions: int64 [3, L], as transformers numbers one sequence without padding.
        types: [L], 0 for text; a run of another value is one video or image.

    Returns:
        int64 [3, L]; the same values where transformers follows the rule already.
    """
    shifted, begin = positions.clone(), 0
    for kind, run in itertools.groupby(types.tolist()):
        end = begin + sum(1 for _ in run)
        if kind and end < len(types):
            shifted[:, end:] += shifted[:, begin:end].max() + 1 - shifted[0, end]
        begin = end
    return shifted


def library_follows(model: nn.Module) -> bool:
    """Return True if the installed transformers numbers the tokens of this model by the rule of pretraining."""
    merge = model.config.vision_config.spatial_merge_size
    types = torch.tensor([[0, *[2] * 8, 0]])
    for seconds in (0.5, 4.0):  # less than a second, and more than the grid's side
        inputs = {"video_grid_thw": torch.tensor([[8, merge, merge]]), "second_per_grid_ts": [seconds]}
        ours, library = (
            rope_index_function(model, rule)(model, torch.zeros_like(types), types, **inputs)[0]
            for rule in ("pretraining", "library")
        )
        if not torch.equal(ours, library):
            return False
    return True
