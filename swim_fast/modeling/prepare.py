"""All changes to a model for training, in one order, and their removal.

1. Liger replaces the forwards of plain modules, before adapters wrap some of them; MLPs are tiled around them.
2. Adapters freeze every weight and are trained in its place.
3. Freezing has the last word on what is trained.
4. Noun attention answers the maps.
5. The text loss is computed in the head, which may be wrapped by then.
6. Position ids follow the rule of pretraining or the library's.
7. Packing, 8. offload and 9. the visual pass of every step wrap the calls of language model and vision tower.
10. Sequence parallelism cuts what all these hand to the decoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from swim_fast.modeling.adapters import add_adapters, remove_adapters
from swim_fast.modeling.freezing import freeze, keep_visual_in_step
from swim_fast.modeling.hooks import remove_hooks
from swim_fast.modeling.liger import apply_liger, remove_liger
from swim_fast.modeling.noun_attention import attach_noun_attention, detach_noun_attention
from swim_fast.modeling.offload import offload_activations
from swim_fast.modeling.packed import accept_packed_batches
from swim_fast.modeling.positions import restore_position_rule, set_position_rule
from swim_fast.modeling.sequence_group import SequenceGroup
from swim_fast.modeling.sequence_parallel import share_sequences, stop_sharing
from swim_fast.modeling.text_loss import attach_text_loss, detach_text_loss
from swim_fast.modeling.tiled_mlp import tile_mlps, untile_mlps


def prepare_model(
    model: nn.Module,
    *,
    liger: bool = False,
    device: torch.device | str = "cpu",
    lora: Any = None,
    seed: int = 0,
    frozen: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    backend: str = "auto",
    fused: bool = True,
    provider: str = "auto",
    position_ids: str = "pretraining",
    packed: bool = False,
    activation_offload: bool = False,
    ranks: int = 1,
    sharded: bool = False,
    sequence_group: SequenceGroup | None = None,
    mlp_tiles: int = 1,
) -> nn.Module:
    """Prepare a stock model for training with noun maps and text loss; `restore_model` undoes it.

    Args:
        model: a stock `…ForConditionalGeneration` of a supported family.
        liger, device: use Liger's kernels, as far as they run on the device.
        lora, seed: options of adapters and the seed of their weights, see `add_adapters`; None: train the weights.
        frozen: parts that are not trained, see `freeze`.
        layers, backend, fused, provider: see `attach_noun_attention`; an empty list: no maps.
        position_ids: rule by which tokens are numbered, see `set_position_rule`.
        packed: take batches of several samples in one sequence.
        activation_offload: keep the decoder's activations in host memory.
        ranks, sharded: processes that train together, and a division of the weights among them (ZeRO-3, FSDP); see
            `keep_visual_in_step`.
        sequence_group: ranks that share samples, see `share_sequences`; None: each has its own.
        mlp_tiles: parts in which an MLP takes its tokens, see `tile_mlps`.

    Returns:
        The same model. If an option is refused, the model is left as it was.

    Raises:
        UnsupportedModelError: no entry for the model's family.
        OptionError: layers, parts or adapter targets that the model does not have.
        MissingLibraryError: peft is not installed.
    """
    model._trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        if liger:
            apply_liger(model, device)
        tile_mlps(model, mlp_tiles)
        if lora is not None:
            add_adapters(model, lora, list(frozen), seed)
        freeze(model, list(frozen))
        if layers is None or len(layers):
            attach_noun_attention(model, layers, backend, fused, provider)
        attach_text_loss(model, liger)
        set_position_rule(model, position_ids)
        if packed:
            accept_packed_batches(model)
        if activation_offload:
            offload_activations(model)
        if ranks > 1:
            keep_visual_in_step(model, sharded)
        if sequence_group is not None:
            share_sequences(model, sequence_group)
    except BaseException:
        restore_model(model)
        raise
    return model


def restore_model(model: nn.Module) -> nn.Module:
    """Undo `prepare_model` on a model or a copy of it, which is returned; adapters are dropped, not merged."""
    stop_sharing(model)
    restore_position_rule(model)
    detach_text_loss(model)
    detach_noun_attention(model)
    remove_hooks(model)
    remove_adapters(model)
    untile_mlps(model)
    remove_liger(model)
    if "_trained_before" in vars(model):
        trained = set(vars(model).pop("_trained_before"))
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
    return model
