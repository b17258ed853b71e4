"""Next-token cross-entropy on label positions only, computed where the head is.

Visual tokens and questions carry no label, so only the hidden states of tokens that predict a label go through the
head, and no tensor of all their logits exists. The loss is computed in the head's own `forward`: there, and nowhere
else, do DeepSpeed ZeRO-3 and FSDP have the head's weight at hand, in forward and in backward.
"""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swim_fast.modeling import liger
from swim_fast.modeling.families import family_of
from swim_fast.modeling.linear_cross_entropy import BLOCK_LOGITS, linear_cross_entropy_sum

logger = logging.getLogger(__name__)

IGNORE = -100


def count_labels(labels: Tensor) -> Tensor:
    """Number of labels that are predicted (the first token of a sequence never is); scalar int64."""
    return (labels[:, 1:] != IGNORE).sum()


def attach_label_loss(model: nn.Module, use_liger: bool = True, block_logits: int = BLOCK_LOGITS) -> nn.Module:
    """Make `model(**inputs, text_labels=labels)` answer the text loss in the place of the logits.

    `text_labels` are `[B, L]` int64, -100 where there is no label; label t is predicted at position t - 1. Then
    `outputs.logits` is the sum of -log p(label) over all labels: a scalar, fp32, 0 with a graph through hidden states
    and head if there is no label. Without `text_labels` the model behaves as before.

    Args:
        model: a stock `…ForConditionalGeneration` of a supported family. Its head may be wrapped later (adapters).
        use_liger: on CUDA, Liger's fused linear cross-entropy where it is installed; else blocks in torch.
        block_logits: about how many logits are held at a time.

    Returns:
        The same model. Nothing in its state, nor in what it saves, is changed.

    Raises:
        ValueError: family without adapter. At the forward: `text_labels` of another shape than the tokens whose hidden
            states reach the head (leave `logits_to_keep` out).
    """
    family = family_of(model)
    detach_label_loss(model)
    language_model = model.get_submodule(family.language_model)
    language_model._label_loss = _LabelLoss(model, use_liger, block_logits)
    language_model._label_loss_hooks = [
        language_model.register_forward_pre_hook(_before_language_model, with_kwargs=True),
        language_model.register_forward_hook(_after_language_model),
        model.get_submodule(family.visual).register_forward_pre_hook(_before_visual, with_kwargs=True),
    ]
    return model


def detach_label_loss(model: nn.Module) -> nn.Module:
    """Undo `attach_label_loss`; does nothing to a model that is not attached. Returns the same model."""
    language_model = model.get_submodule(family_of(model).language_model)
    for hook in language_model.__dict__.pop("_label_loss_hooks", []):
        hook.remove()
    language_model.__dict__.pop("_label_loss", None)
    return model


@dataclasses.dataclass(eq=False)
class _LabelLoss:
    """What an attached model knows; lives on its language model as `_label_loss`."""

    model: nn.Module  # whose head is looked up at every call: it may have been wrapped since
    use_liger: bool
    block_logits: int
    labels: Tensor | None = None  # of the call under way
    disarm: Callable[[], None] | None = None  # gives the head its own forward back


# Models hand every keyword on to the language model and to the vision tower.


def _before_language_model(module: nn.Module, args, kwargs):
    state = module._label_loss
    if state.disarm:  # the head was not called, as by somebody who wanted the hidden states alone
        state.disarm()
    state.labels = kwargs.pop("text_labels", None)
    return args, kwargs


def _before_visual(module: nn.Module, args, kwargs):
    kwargs.pop("text_labels", None)
    return args, kwargs


def _after_language_model(module: nn.Module, args, output) -> None:
    """Let the head's next call, and that one alone, answer the loss."""
    state = module._label_loss
    labels, state.labels = state.labels, None
    if labels is None:
        return
    head = state.model.get_submodule(family_of(state.model).head)
    of_instance = vars(head).get("forward")
    forward = head.forward

    def disarm() -> None:
        state.disarm = None
        del head.forward
        if of_instance is not None:
            head.forward = of_instance

    def label_loss(hidden: Tensor) -> Tensor:
        disarm()
        return _loss_of_head(head, forward, hidden, labels, state)

    head.forward, state.disarm = label_loss, disarm


def _loss_of_head(head: nn.Module, forward: Callable, hidden: Tensor, labels: Tensor, state: _LabelLoss) -> Tensor:
    """Text loss of hidden states `[B, L, H]` and labels `[B, L]`, inside the head's call."""
    if hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"text_labels are {list(labels.shape)} and the head gets hidden states {list(hidden.shape[:2])}: give a "
            "label for every token, and no logits_to_keep"
        )
    predicted = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # by each position
    rows = (predicted != IGNORE).nonzero().squeeze(1)
    targets = predicted[rows]
    hidden = hidden.flatten(0, 1).index_select(0, rows)
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        _say(hidden.device.type, f"checkpointed chunks of {type(head).__name__}, which is more than a linear layer")
        vocabulary = state.model.config.get_text_config().vocab_size
        in_step = any(hasattr(p, "ds_id") for p in head.parameters())  # ZeRO-3 partitioned
        return _through(forward, hidden, targets, max(1, state.block_logits // vocabulary), in_step)
    why_not = liger.refusal(hidden.device.type) if state.use_liger else "model.liger is false"
    how = "Liger's fused linear cross-entropy" if why_not is None else f"blocks of the vocabulary in torch ({why_not})"
    _say(hidden.device.type, how)
    arguments = hidden, head.weight, targets, head.bias, state.block_logits
    # Liger divides by zero without a token, and gives the weight no gradient where the hidden states need none.
    without_gradient = torch.is_grad_enabled() and not hidden.requires_grad
    if why_not is None and len(targets) and not without_gradient:
        return _by_liger(*arguments)
    return linear_cross_entropy_sum(*arguments)


def _through(forward: Callable, hidden: Tensor, targets: Tensor, tokens: int, in_step: bool) -> Tensor:
    """Summed loss of any head, chunks of `tokens` tokens at a time; backward calls the head again.

    in_step: every call gathers weights from all ranks, so that all make as many, with empty chunks at last.
    """

    def loss_of(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = forward(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")

    chunks = list(zip(hidden.split(tokens), targets.split(tokens), strict=True))
    if in_step:
        most = torch.tensor(len(chunks), device=hidden.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        chunks += [(hidden[:0], targets[:0])] * (int(most) - len(chunks))
    return torch.stack([checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _by_liger(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, block_logits: int) -> Tensor:
    """Summed loss by Liger, which makes the gradients in its forward.

    Weight gradients are added up in fp32 over Liger's chunks of tokens, which are cut by `block_logits` (but never
    below N · H logits): left alone, Liger cuts 300 tokens of a 7B model into chunks of 8 and reads the whole weight
    for each.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    vocabulary, width = weight.shape
    chunks = -(-len(targets) * vocabulary // block_logits)
    call = inspect.signature(Function.forward).bind(
        None,
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=IGNORE,
        reduction="sum",
        accum_dtype=torch.float32,
        chunk_mem_const=max(1, -(-vocabulary // (width * chunks))),
    )
    call.apply_defaults()
    return Function.apply(*call.args[1:])[0]


@functools.cache
def _say(device_type: str, how: str) -> None:
    """One log line per process for every choice."""
    logger.info("text loss on %s: %s", device_type, how)
