"""The rule by which one model numbers its tokens, in training and in generation."""

import logging
import types

from torch import nn

from swim_fast.families import FAMILIES, find_family
from swim_fast.position_ids import compute_rope_index, library_follows

logger = logging.getLogger(__name__)


def set_position_rule(model: nn.Module, rule: str) -> nn.Module:
    """Let one model number its tokens by a rule; `restore_position_rule` undoes it.

    Generation with a key/value cache follows the same rule: transformers continues from what `get_rope_index` returns.

    Args:
        model: a `…ForConditionalGeneration`; one of another family than Qwen2-VL's stays as the library has it.
        rule: `pretraining` or `library`, see `swim_fast.options.Weights`.

    Returns:
        The same model.
    """
    restore_position_rule(model)
    module = _numbering(model)
    if module is None:
        known = ", ".join(family.name for family in FAMILIES if family.pretraining_rule)
        logger.info("position ids: as transformers numbers them; the rule of pretraining is known for %s only", known)
    elif library_follows(module):
        logger.info("position ids: by the rule of pretraining, which the installed transformers follows by itself")
    elif rule == "pretraining":
        module.get_rope_index = types.MethodType(compute_rope_index, module)
        logger.info("position ids: by the rule of pretraining, text goes on after the largest position of a video")
    else:
        logger.info("position ids: as transformers numbers them, which is not the rule of pretraining for long videos")
    return model


def restore_position_rule(model: nn.Module) -> None:
    """Undo `set_position_rule`; does nothing where the library numbers the tokens."""
    module = _numbering(model)
    if module is not None:
        vars(module).pop("get_rope_index", None)


def _numbering(model: nn.Module) -> nn.Module | None:
    """Return the module whose `get_rope_index` numbers the tokens; None where the library's rule is the only one."""
    family = find_family(getattr(model, "config", None))
    return model.get_submodule(family.numbering) if family is not None and family.pretraining_rule else None
