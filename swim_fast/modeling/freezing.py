"""Freezing of model parts, and their share in every step of a distributed run."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from swim_fast.errors import OptionError
from swim_fast.families import get_family
from swim_fast.modeling.hooks import add_context, add_keyword_step

PARTS = ("vision_tower", "merger", "language_model")


def get_part_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of `vision_tower` (without mergers), `merger` and `language_model` (with head)."""
    family = get_family(model)
    merger = [p for path in family.mergers for p in model.get_submodule(path).parameters()]
    merger += [model.get_parameter(path) for path in family.merger_parameters]
    inside = {id(p) for p in merger}
    text = (*model.get_submodule(family.language_model).parameters(), *model.get_submodule(family.head).parameters())
    return {
        "vision_tower": [p for p in model.get_submodule(family.visual).parameters() if id(p) not in inside],
        "merger": merger,
        "language_model": list(text),
    }


def freeze(model: nn.Module, parts: list[str]) -> None:
    """Freeze parts of a model, see `get_part_parameters`.

    A visual module that is frozen as a whole runs under `no_grad`, so that activation checkpointing does not recompute
    it either.

    Raises:
        OptionError: an unknown part, or nothing left to train.
    """
    family = get_family(model)
    visual, by_part = model.get_submodule(family.visual), get_part_parameters(model)
    for path in family.unused(model):
        model.get_submodule(path).requires_grad_(False)
    for part in parts:
        if part not in by_part:
            raise OptionError(f"cannot freeze {part!r}: the parts are {', '.join(PARTS)}")
        for parameter in by_part[part]:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError(f"freezing {', '.join(parts)} leaves nothing to train")
    if not any(p.requires_grad for p in visual.parameters()):
        add_context(visual, "frozen", lambda visual, kwargs: torch.no_grad())


def keep_visual_in_step(model: nn.Module, sharded: bool = False) -> None:
    """Let a batch without images or video pass a minimal one through the visual module, times zero.

    With several ranks every trainable parameter must take part in every gradient reduction (and, under ZeRO-3 and FSDP,
    every module in every gather), whatever the batch of this rank holds. The pass runs where the model would run it:
    after the embeddings, before the first decoder layer.

    Args:
        sharded: the parameters are gathered for each pass (ZeRO-3, FSDP), so that the number of passes must be the same
            on all ranks: a batch with both images and videos has two. Costs a reduction of one number per forward.
    """
    add_context(model, "visual_in_step", partial(_count_missing_passes, sharded=sharded))
    add_keyword_step(model, "visual_in_step", partial(_add_missing_passes, model))


@contextlib.contextmanager
def _count_missing_passes(model: nn.Module, kwargs: dict, sharded: bool) -> Iterator[None]:
    own = wanted = sum(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    if sharded:
        most = torch.tensor(own, device=kwargs["input_ids"].device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        wanted = int(most)
    kwargs["missing_passes"] = max(wanted, 1) - own
    yield


def _add_missing_passes(model: nn.Module, language_model: nn.Module, kwargs: dict) -> dict:
    embeds, family = kwargs["inputs_embeds"], get_family(model)
    for _ in range(kwargs.pop("missing_passes", 0)):
        embeds = embeds + family.minimal_pass(model).to(embeds.dtype).sum() * 0
    for path in family.merger_parameters:  # such as the newline between the rows of an image, which no video has
        embeds = embeds + model.get_parameter(path).to(embeds.dtype).sum() * 0  # FSDP exchanges the parameter itself
    return kwargs | {"inputs_embeds": embeds}
