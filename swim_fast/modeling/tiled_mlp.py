"""MLPs of the decoder that take their tokens in tiles, one after the other.

An intermediate activation of an MLP is several times as wide as the hidden states: 1.2 GB in bf16 for 32 k tokens of a
7B model, and backward of one layer needs three of them at a time. In tiles, each is recomputed in backward, and one
tile's exist at a time. The tokens are independent of one another, so that outputs are the same.
"""

from __future__ import annotations

import functools
import types

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swim_fast.errors import OptionError
from swim_fast.families import get_family


def tile_mlps(model: nn.Module, tiles: int) -> nn.Module:
    """Let the MLP of each decoder layer take its tokens in `tiles` parts; `untile_mlps` undoes it.

    The number of parts is the same for every length, as each part gathers the weights from all ranks under ZeRO-3.

    Args:
        model: after Liger's kernels, which replace the forward of an MLP.
        tiles: parts, 1 or more.

    Returns:
        The same model.

    Raises:
        OptionError: the layers have no MLP that answers hidden states alone, such as those of experts.
    """
    untile_mlps(model)
    for mlp in _get_mlps(model) if tiles > 1 else ():
        if not hasattr(mlp, "down_proj"):
            raise OptionError(f"model.mlp_tiles is {tiles}, and {type(mlp).__name__} is no plain MLP: remove it")
        mlp._tiles, mlp._untiled = tiles, vars(mlp).get("forward")
        mlp.forward = types.MethodType(_forward_in_tiles, mlp)
    return model


def untile_mlps(model: nn.Module) -> None:
    """Undo `tile_mlps`; does nothing to a model without."""
    for mlp in _get_mlps(model):
        if vars(mlp).pop("_tiles", None) is not None:
            del mlp.forward
            former = vars(mlp).pop("_untiled")
            if former is not None:
                mlp.forward = former


def _get_mlps(model: nn.Module) -> list[nn.Module]:
    layers = model.get_submodule(get_family(model).language_model).layers
    return [layer.mlp for layer in layers if hasattr(layer, "mlp")]


def _forward_in_tiles(self: nn.Module, hidden: Tensor) -> Tensor:
    whole = self._untiled or functools.partial(type(self).forward, self)
    tiles = hidden.tensor_split(self._tiles, dim=1)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(whole, tile, use_reentrant=False) for tile in tiles], dim=1)
    return torch.cat([whole(tile) for tile in tiles], dim=1)
