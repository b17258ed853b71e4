"""What is trained and what is frozen."""

import torch
from torch import nn

from swim_fast.modeling.families import family_of

PARTS = ("vision_tower", "merger", "language_model")


def parameters_of_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each part: `vision_tower` (without its merger), `merger`, `language_model` (with its head)."""
    family = family_of(model)
    merger = list(model.get_submodule(family.merger).parameters())
    inside = {id(p) for p in merger}
    text = (*model.get_submodule(family.language_model).parameters(), *model.get_submodule(family.head).parameters())
    return {
        "vision_tower": [p for p in model.get_submodule(family.visual).parameters() if id(p) not in inside],
        "merger": merger,
        "language_model": list(text),
    }


def freeze(model: nn.Module, parts: list[str]) -> None:
    """Freeze parts of a model, see `parameters_of_parts`.

    A visual module that is frozen as a whole runs under `no_grad`, so that activation checkpointing does not recompute
    it either.

    Raises:
        ValueError: an unknown part, or nothing left to train.
    """
    visual = model.get_submodule(family_of(model).visual)
    of_part = parameters_of_parts(model)
    for part in parts:
        if part not in of_part:
            raise ValueError(f"cannot freeze {part!r}: the parts are {', '.join(PARTS)}")
        for parameter in of_part[part]:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freezing {', '.join(parts)} leaves nothing to train")
    if not any(p.requires_grad for p in visual.parameters()):
        visual.forward = torch.no_grad()(visual.forward)


def keep_visual_in_step(model: nn.Module, sharded: bool = False) -> None:
    """Let a batch without images or video pass a minimal one through the visual module, times zero.

    With several ranks every trainable parameter must take part in every gradient reduction (and, under ZeRO-3, every
    module in every gather), whatever the batch of this rank holds. The pass runs where the model would run it: after
    the embeddings, before the first decoder layer.

    Args:
        sharded: the parameters are gathered for each pass (ZeRO-3), so that the number of passes must be the same on
            all ranks: a batch with both images and videos has two. Costs a reduction of one number per forward.
    """
    family = family_of(model)
    visual = model.get_submodule(family.visual)
    config = model.config.vision_config
    merge = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    passes = {"made": 0, "wanted": 1}

    def before_model(module, args, kwargs):
        own = sum(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        wanted = torch.tensor(max(own, 1), device=kwargs["input_ids"].device)
        torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        passes["wanted"] = int(wanted)

    def after_visual(module, args, output):
        passes["made"] += 1

    def before_language_model(module, args, kwargs):
        embeds = kwargs["inputs_embeds"]
        while passes["made"] < passes["wanted"]:
            pixels = embeds.new_zeros(merge * merge, width, dtype=visual.dtype)
            features = visual(pixels, grid_thw=torch.tensor([[1, merge, merge]], device=embeds.device)).pooler_output
            embeds = embeds + features.to(embeds.dtype).sum() * 0
        passes["made"] = 0
        return args, kwargs | {"inputs_embeds": embeds}

    if sharded:
        model.register_forward_pre_hook(before_model, with_kwargs=True)
    visual.register_forward_hook(after_visual)
    model.get_submodule(family.language_model).register_forward_pre_hook(before_language_model, with_kwargs=True)
