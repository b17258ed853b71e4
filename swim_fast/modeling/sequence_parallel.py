"""Sequence parallelism: P ranks share one sample, in an unmodified Hugging Face model.

Every rank takes the whole batch, of videos the pixels of its share alone. Images and videos are divided among the ranks
by temporal patches where the vision tower keeps those apart (`shared_vision`). The sequence is cut into P parts of one
length before its tokens are embedded, or, where positions do not come with the batch, at the door of the decoder stack.
Inside each attention one all-to-all gives a rank the queries, keys and values of the whole sequence for Hq / P heads,
and a second one takes the output back to the parts (DeepSpeed-Ulysses, arXiv 2309.14509). A rank's noun maps are the
mean over its heads, and one reduction makes them the model's.

Whatever is not cut (masks, lengths of packed samples, noun queries, targets) is that of one rank. Engines that average
gradients over all ranks need not know of it: every rank's loss is its share, and the shares add up.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import create_causal_mask

from swim_fast.errors import OptionError
from swim_fast.families import get_attentions, get_family
from swim_fast.frame_shares import FrameShare
from swim_fast.modeling.attention_interface import get_attention, name_attention
from swim_fast.modeling.hooks import add_context, add_keyword_step, remove_context, remove_keyword_step
from swim_fast.modeling.noun_attention import MapsAndMasses
from swim_fast.modeling.sequence_group import SequenceGroup
from swim_fast.modeling.shared_vision import SharedVision

ATTENTION_NAME = "swim_shared_sequence"
_CUT = ("inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds")
_WHOLE = ("cu_seq_lens_q", "cu_seq_lens_k")  # tensors that stay those of the whole sequence


@dataclasses.dataclass(frozen=True)
class _Whole:
    """What the attention needs to know of the whole sequence; travels as the keyword `whole`.

    Attributes:
        length: tokens L, without what fills them up to a multiple of P.
        mask: of the attention that is wrapped, as it gets it.
        positions: [B, L] positions in the text, by which flash attention tells packed samples apart, or None.
    """

    length: int
    mask: Any
    positions: Tensor | None


@dataclasses.dataclass
class _Shared:
    """State of one attention module, kept on it as `_shared_sequence`."""

    config: Any  # the module's own, which names the attention that is wrapped
    group: SequenceGroup


def find_group_sizes(heads: int, key_heads: int) -> list[int]:
    """Return the P that divide the heads of an attention, 2 and more: of P and Hkv one is a multiple of the other."""
    return [p for p in range(2, heads + 1) if heads % p == 0 and (key_heads % p == 0 or p % key_heads == 0)]


def get_group_sizes(config: Any) -> list[int]:
    """Return the numbers of ranks, 2 and more, that can share a sequence of a model, or decoder, of a configuration."""
    text = config.get_text_config()
    return [] if _find_other_layers(text) else find_group_sizes(*_count_heads(text))


def _find_other_layers(text: Any) -> set[str]:
    return set(getattr(text, "layer_types", None) or ()) - {"full_attention"}


def _count_heads(text: Any) -> tuple[int, int]:
    """Return the query and key heads of a decoder's attention."""
    return text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def check_group_size(config: Any, ranks: int) -> None:
    """Refuse a number of ranks that cannot share a sequence.

    Args:
        config: of the model, or of its decoder.
        ranks: P.

    Raises:
        OptionError: naming the numbers that can.
    """
    text = config.get_text_config()
    types = _find_other_layers(text)
    if types:
        raise OptionError(
            f"training.sequence_parallel is {ranks}, and {text.model_type} has layers of {', '.join(sorted(types))}, "
            "which cannot be shared by heads; remove it"
        )
    heads, key_heads = _count_heads(text)
    sizes = get_group_sizes(config)
    if ranks not in sizes:
        known = f"take one of {', '.join(map(str, sizes))}" if sizes else "remove it"
        raise OptionError(
            f"training.sequence_parallel is {ranks}, and the {heads} heads and {key_heads} key heads of "
            f"{text.model_type} cannot be divided by it; {known}"
        )


def share_sequences(model: nn.Module, group: SequenceGroup) -> nn.Module:
    """Let the ranks of a group work on one sample; `stop_sharing` undoes it.

    Every rank calls the model with the same batch. `outputs.logits` and hidden states are of this rank's part; the text
    loss of `attach_text_loss` is the sum over its labels, and noun maps are the whole model's, on every rank.

    Args:
        model: after `attach_noun_attention` and all keyword steps.
        group: the ranks.

    Returns:
        The same model.

    Raises:
        OptionError: a number of ranks, or a family of models, that cannot share sequences.
    """
    stop_sharing(model)
    family, attentions = get_family(model), get_attentions(model)
    language_model, visual = model.get_submodule(family.language_model), model.get_submodule(family.visual)
    check_group_size(language_model.config, group.ranks)
    for module in attentions:
        module._shared_sequence = _Shared(module.config, group)
        module.config = name_attention(module.config, ATTENTION_NAME)
    add_keyword_step(model, "sequence_parallel", functools.partial(_cut, group))
    hooks = [language_model.register_forward_hook(functools.partial(_join, group), with_kwargs=True)]
    if family.frames_apart:
        shared = SharedVision(group, visual.spatial_merge_size)
        hooks += [
            visual.register_forward_pre_hook(shared.before_tower, with_kwargs=True),
            visual.register_forward_hook(shared.after_tower),
        ]
        if family.embeds_part:
            add_context(model.get_submodule(family.numbering), "sequence_parallel", shared.embed_part)
    model._sequence_group, model._sequence_hooks = group, hooks
    return model


def stop_sharing(model: nn.Module) -> nn.Module:
    """Undo `share_sequences`; does nothing to a model that shares none. Returns the same model."""
    for module in get_attentions(model):
        state = vars(module).pop("_shared_sequence", None) if module is not None else None
        if state is not None:
            module.config = state.config
    for hook in vars(model).pop("_sequence_hooks", ()):
        hook.remove()
    vars(model).pop("_sequence_group", None)
    remove_keyword_step(model, "sequence_parallel")
    family = get_family(model)
    if family.embeds_part:
        remove_context(model.get_submodule(family.numbering), "sequence_parallel")
    return model


def get_sequence_group(model: nn.Module) -> SequenceGroup | None:
    """Return the ranks that share the sequences of a bare model; None: every rank has its own."""
    return vars(model).get("_sequence_group")


def get_frame_share(model: nn.Module) -> FrameShare | None:
    """Return which of the ranks that share a sample this one is; None: a rank needs the pixels of whole videos."""
    group = get_sequence_group(model)
    return FrameShare(group.ranks, group.rank) if group is not None and get_family(model).frames_apart else None


def select_own_labels(
    group: SequenceGroup, targets: Tensor, positions: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Return the labels that this rank's part of the sequences predicts.

    Waits for the device: how many there are is a value.

    Args:
        targets: [n] labels.
        positions: [n] int64, the positions that predict them, counted through all of [B, L].
        shape: (B, L).

    Returns:
        The rank's targets, and their positions counted through its part [B, l].
    """
    length = group.count_part(shape[1])
    token = positions % shape[1]
    own = (token // length == group.rank).nonzero().squeeze(1)
    return targets[own], (positions // shape[1])[own] * length + token[own] % length


# the door of the decoder stack


def _cut(group: SequenceGroup, language_model: nn.Module, kwargs: dict) -> dict:
    """Return the keywords of the language model for this rank's part."""
    other = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in (*_CUT, *_WHOLE)]
    if other:
        raise OptionError(f"{type(language_model).__name__} gets {other[0]}, which sequence parallelism does not know")
    embeds, mask, positions = (kwargs.get(name) for name in ("inputs_embeds", "attention_mask", "position_ids"))
    length = kwargs.pop("whole_length", None)  # of tokens that were cut before they were embedded
    cut = length is not None
    batch, length = len(embeds), length if cut else embeds.shape[1]
    if positions is None:
        positions = torch.arange(length, device=embeds.device).expand(batch, -1)
    text = positions[0] if positions.ndim == 3 and len(positions) == 4 else positions if positions.ndim == 2 else None
    if positions.ndim == 3 and len(positions) == 4:  # the mask is made here: the layers' own would be of a part
        positions = positions[1:]
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    else:
        like = embeds.new_empty(batch, length, 0)
        mask = create_causal_mask(language_model.config, like, mask, None, position_ids=text)
    kwargs |= {
        "inputs_embeds": embeds if cut else group.get_part(embeds, 1).clone(),  # a view would keep the whole
        "position_ids": group.get_part(positions, -1),
        "attention_mask": None,
        "use_cache": False,
        "whole": _Whole(length, mask, text),
    }
    if kwargs.get("deepstack_visual_embeds") is not None and not cut:
        kwargs |= _cut_deepstack(group, kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"])
    return kwargs


def _cut_deepstack(group: SequenceGroup, places: Tensor, features: Any) -> dict:
    """Return the visual places [B, l] of a part, and the features that are added there."""
    number = (places.flatten().cumsum(0) - 1).view(places.shape)
    own = group.get_part(places, 1)
    chosen = group.get_part(number, 1)[own]
    return {"visual_pos_masks": own, "deepstack_visual_embeds": [layer[chosen] for layer in features]}


def _join(group: SequenceGroup, language_model: nn.Module, args, kwargs, output):
    """Make the noun maps of a rank's heads those of the model."""
    answers = output.attentions
    if not answers:
        return output
    if kwargs.get("noun_queries") is None and kwargs.get("mass_queries") is None:
        raise OptionError("attention weights are not to be had under sequence parallelism: output_attentions=False")
    maps = [answer.maps if isinstance(answer, MapsAndMasses) else answer for answer in answers]
    if maps[0] is not None:
        maps = (group.add(torch.stack(maps)) / group.ranks).unbind()
    if isinstance(answers[0], MapsAndMasses):
        masses = group.gather(torch.stack([answer.masses for answer in answers]), 2).unbind()  # [layers, R', Hq, S]
        maps = [MapsAndMasses(*pair) for pair in zip(maps, masses, strict=True)]
    output.attentions = tuple(maps)
    return output


# attention


def shared_attention_forward(module, query, key, value, attention_mask, whole: _Whole, **kwargs):
    """Attention function of a shared layer: the one that is wrapped, on whole sequences of a P-th of the heads.

    Args:
        query: [B, Hq, l, D] of this rank's part; `key`, `value`: [B, Hkv, l, D].
        attention_mask: of the part, not used.
        whole: of the whole sequence.

    Returns:
        The output [B, l, Hq, D], and what the attention answers beside it: noun maps over this rank's heads.
    """
    state = module._shared_sequence
    query, key, value = _to_heads(state.group, query, key, value, whole.length)
    attention = get_attention(module, state.config, query.shape[1] // key.shape[1])
    kwargs["position_ids"] = whole.positions
    output, answer = attention(query, key, value, whole.mask, **kwargs)
    return _to_parts(state.group, output), answer


AttentionInterface.register(ATTENTION_NAME, shared_attention_forward)


def _to_heads(group: SequenceGroup, query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, ...]:
    """Exchange parts of the sequence for heads: [B, H, l, D] → [B, H / P, L, D], all three at once."""
    if group.ranks > key.shape[1]:
        key, value = (tensor.repeat_interleave(group.ranks // key.shape[1], 1) for tensor in (key, value))
    by_rank = [tensor.unflatten(1, (group.ranks, -1)) for tensor in (query, key, value)]
    whole = group.exchange(torch.cat(by_rank, 2).transpose(0, 1))  # [P, B, heads, l, D]
    whole = whole.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
    return whole.split([tensor.shape[2] for tensor in by_rank], 1)


def _to_parts(group: SequenceGroup, output: Tensor) -> Tensor:
    """Exchange heads for parts of the sequence: [B, L, H / P, D] → [B, l, H, D]."""
    missing = -output.shape[1] % group.ranks
    if missing:
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, missing))
    parts = output.unflatten(1, (group.ranks, -1)).transpose(0, 1)
    return group.exchange(parts).permute(1, 2, 0, 3, 4).flatten(2, 3)
