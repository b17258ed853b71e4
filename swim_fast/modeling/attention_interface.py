"""Attention functions of transformers, put in place of one another in single modules of one model.

A module gets a copy of its configuration that names another function; the configuration that is saved stays as it was.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class _WithConfig:
    """An attention module with another configuration, in which flash attention reads its name.

    Attributes:
        num_key_value_groups: query heads of each key head, where there are others than the module's.
    """

    def __init__(self, module: nn.Module, config: Any, key_groups: int | None = None):
        self.module = module
        self.config = config
        if key_groups is not None:
            self.num_key_value_groups = key_groups

    def __getattr__(self, name):
        return getattr(self.module, name)


def get_attention(module: nn.Module, config: Any, key_groups: int | None = None) -> Callable:
    """Return the attention function that a configuration names, for a module whose own may name another.

    Args:
        key_groups: query heads of each key head; None: as many as the module has, or was given before.
    """
    if isinstance(module, _WithConfig):
        key_groups = vars(module).get("num_key_value_groups") if key_groups is None else key_groups
        module = module.module
    name = config._attn_implementation
    if name == "eager":  # a function of the module's own modeling file
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    return functools.partial(function, _WithConfig(module, config, key_groups))


def name_attention(config: Any, name: str) -> Any:
    """Return a copy of a configuration that names a registered attention function."""
    config = copy.copy(config)
    config._attn_implementation_internal = name
    return config
