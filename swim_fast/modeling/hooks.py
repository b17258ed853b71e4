"""Removable changes to the calls of one model's modules: contexts around a forward, and the keywords it gets.

Stock models hand each keyword that their forward does not know to the language model and to the vision tower alike.
One pre-hook on each of the two sorts them. All changes live on the modules, so that a deep copy of a model has its own.
"""

import contextlib
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from swim_fast.families import get_family

_NOT_FOR_VISUAL = (
    *("noun_queries", "mass_queries", "mass_sets", "missing_passes"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("right_padded", "whole_length"),
    "num_items_in_batch",  # transformers' denominator of the text loss
)


def add_context(module: nn.Module, name: str, context: Callable[[nn.Module, dict], AbstractContextManager]) -> None:
    """Run each forward of a module within `context(module, keywords)`, until `remove_context(module, name)`."""
    if "_contexts" not in vars(module):
        module._contexts = {}
        module._former_forward = vars(module).get("forward")
        module.forward = types.MethodType(_within_contexts(type(module).forward), module)
    module._contexts[name] = context


def remove_context(module: nn.Module, name: str) -> None:
    """Undo `add_context`; does nothing where no context has this name."""
    contexts = vars(module).get("_contexts", {})
    contexts.pop(name, None)
    if contexts or not hasattr(vars(module).get("forward"), "_within_contexts"):
        return  # without contexts, a forward that has been wrapped since then does no harm
    del module.forward, module._contexts
    former = vars(module).pop("_former_forward")
    if former is not None:
        module.forward = former


def _within_contexts(of_class: Callable) -> Callable:
    @functools.wraps(of_class)  # transformers reads the signature
    def forward(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            for context in self._contexts.values():
                stack.enter_context(context(self, kwargs))
            return (self._former_forward or functools.partial(of_class, self))(*args, **kwargs)

    forward._within_contexts = True
    return forward


def leave_out_cache(model: nn.Module, name: str, keyword: str) -> None:
    """Let a model that is called with `keyword` make no key/value cache, until `remove_context(model, name)`.

    The decoder's own keywords come too late for the families that have made one by then.
    """

    @contextlib.contextmanager
    def without_cache(model: nn.Module, kwargs: dict):
        if kwargs.get(keyword) is not None:
            kwargs["use_cache"] = False
        yield

    if get_family(model).cacheless:
        add_context(model, name, without_cache)


def add_keyword_step(
    model: nn.Module, name: str, step: Callable[[nn.Module, dict], dict] = lambda language_model, keywords: keywords
) -> None:
    """Let `step(language_model, keywords)` return the keywords of each call of the language model.

    From the first step to the removal of the last one, keywords meant for the language model or the loss do not reach
    the vision tower.
    """
    family = get_family(model)
    language_model = model.get_submodule(family.language_model)
    if "_keyword_steps" not in vars(language_model):
        language_model._keyword_steps = {}
        language_model._keyword_hooks = [
            language_model.register_forward_pre_hook(_before_language_model, with_kwargs=True),
            model.get_submodule(family.visual).register_forward_pre_hook(_before_visual, with_kwargs=True),
        ]
    language_model._keyword_steps[name] = step


def remove_keyword_step(model: nn.Module, name: str) -> None:
    """Undo `add_keyword_step`; does nothing where no step has this name."""
    language_model = model.get_submodule(get_family(model).language_model)
    steps = vars(language_model).get("_keyword_steps", {})
    steps.pop(name, None)
    if not steps and vars(language_model).pop("_keyword_steps", None) is not None:
        for hook in vars(language_model).pop("_keyword_hooks"):
            hook.remove()


def remove_hooks(model: nn.Module) -> None:
    """Remove all contexts and keyword steps of a model."""
    for module in model.modules():
        for name in list(vars(module).get("_contexts", ())):
            remove_context(module, name)
    for name in list(getattr(model.get_submodule(get_family(model).language_model), "_keyword_steps", ())):
        remove_keyword_step(model, name)


def _before_visual(module: nn.Module, args, kwargs):
    return args, {key: value for key, value in kwargs.items() if key not in _NOT_FOR_VISUAL}


def _before_language_model(module: nn.Module, args, kwargs):
    kwargs.pop("num_items_in_batch", None)
    for step in module._keyword_steps.values():
        kwargs = step(module, kwargs)
    return args, kwargs
