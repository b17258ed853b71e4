"""Separate learning rates for parts of a model."""

import torch
from torch import nn

from swim_fast.errors import OptionError


def split_groups(
    optimizer: torch.optim.Optimizer, parts: dict[str, list[nn.Parameter]], learning_rates: dict[str, float]
) -> None:
    """Split the parameter groups of an optimizer that has made no step yet, so that each part has its learning rate.

    The pieces of a group keep its options (weight decay, momentum, …). Those without a separate rate come first, since
    trainers log the first group's learning rate; the others have their part's name as `group["part"]`. A scheduler made
    afterwards scales every group from its own rate.

    Args:
        parts: parameters by the name of their part; parameters in none of them keep their group's rate.
        learning_rates: by the name of the part.

    Raises:
        OptionError: a part of which the optimizer has no parameter.
    """
    part_of = {id(p): part for part in learning_rates for p in parts[part]}
    shared, own = [], []
    for group in optimizer.param_groups:
        pieces: dict[str | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            pieces.setdefault(part_of.get(id(parameter)), []).append(parameter)
        for part, parameters in pieces.items():
            piece = {**group, "params": parameters}
            if part is None:
                shared.append(piece)
            else:
                own.append({**piece, "lr": learning_rates[part], "part": part})
    for part in learning_rates:
        if part not in {group["part"] for group in own}:
            raise OptionError(f"optimization.learning_rates names {part}, but nothing of it is trained: remove it")
    optimizer.param_groups[:] = shared + own
