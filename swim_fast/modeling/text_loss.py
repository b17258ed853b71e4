"""Next-token cross-entropy on label positions only, computed where the head is.

Visual tokens and questions carry no label, so only the hidden states of tokens that predict a label go through the
head, and no tensor of all their logits exists. The loss is computed in the head's own `forward`: there, and nowhere
else, do DeepSpeed ZeRO-3 and FSDP have the head's weight at hand, in forward and in backward.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swim_fast.families import get_family
from swim_fast.labels import IGNORED_LABEL, count_labels, find_label_positions, shift_labels
from swim_fast.modeling import liger
from swim_fast.modeling.hooks import add_context, add_keyword_step, remove_context, remove_keyword_step
from swim_fast.modeling.linear_cross_entropy import BLOCK_LOGITS, linear_cross_entropy_sum
from swim_fast.modeling.sequence_parallel import get_sequence_group, select_own_labels

logger = logging.getLogger(__name__)


def attach_text_loss(model: nn.Module, use_liger: bool = True, block_logits: int = BLOCK_LOGITS) -> nn.Module:
    """Make `model(**inputs, labels=labels)` compute its loss on the label positions alone.

    `outputs.loss` is the stock model's: the mean over the labels, or their sum divided by `num_items_in_batch` where
    that is given; 0 with a graph through hidden states and head if there is no label. `outputs.logits` is the sum, a
    scalar, since all logits exist nowhere. Without `labels` the model behaves as before. `model(…, label_positions=…)`,
    as `Collator` gives them, spares an accelerator the wait of `find_label_positions`.

    Args:
        model: a stock `…ForConditionalGeneration` of a supported family. Its head may be wrapped later (adapters).
        use_liger: on CUDA, Liger's fused linear cross-entropy where it is installed; else blocks in torch.
        block_logits: about how many logits are held at a time.

    Returns:
        The same model. Nothing in its state, nor in what it saves, is changed.

    Raises:
        UnsupportedModelError: no entry for the model's family.
        ValueError: at the forward: labels of another shape than the tokens whose hidden states reach the head (leave
            `logits_to_keep` out).
    """
    detach_text_loss(model)
    model._text_loss = _Attached(use_liger, block_logits, vars(model).get("_loss_function"))
    model.loss_function = functools.partial(_scale, model.loss_function)
    add_context(model, "text_loss", _loss_at_head)
    add_keyword_step(model, "text_loss")  # num_items_in_batch is not for the vision tower
    return model


def detach_text_loss(model: nn.Module) -> nn.Module:
    """Undo `attach_text_loss`; does nothing to a model that is not attached. Returns the same model."""
    attached = vars(model).pop("_text_loss", None)
    if attached is not None:
        remove_context(model, "text_loss")
        remove_keyword_step(model, "text_loss")
        del model._loss_function
        if attached.loss_function is not None:
            model.loss_function = attached.loss_function
    return model


class _Attached(NamedTuple):
    """State of an attached model, kept on it as `_text_loss`."""

    use_liger: bool
    block_logits: int
    loss_function: Callable | None  # the one that was set before


def _scale(stock: Callable, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch=None, **kwargs):
    """`loss_function` of an attached model, whose head has answered the summed loss in place of logits."""
    if logits.ndim:  # labels given by position
        return stock(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, **kwargs)
    items = count_labels(labels).clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return logits / (items.to(logits.device) if isinstance(items, Tensor) else items)


@contextlib.contextmanager
def _loss_at_head(model: nn.Module, keywords: dict) -> Iterator[None]:
    """Let the head answer the summed loss of the labels among the keywords of a forward."""
    labels, positions = keywords.get("labels"), keywords.pop("label_positions", None)
    if labels is None:
        yield
        return
    head = model.get_submodule(get_family(model).head)  # which may have been wrapped since
    former, forward = vars(head).get("forward"), head.forward
    is_linear = former is None and type(head).forward is nn.Linear.forward
    positions = find_label_positions(labels) if positions is None else positions
    targets, group = shift_labels(labels).index_select(0, positions), get_sequence_group(model)
    shape = labels.shape
    if group is not None:
        targets, positions = select_own_labels(group, targets, positions, shape)
        shape = (shape[0], group.count_part(shape[1]))
    head.forward = lambda hidden: _sum_at_head(
        model, head, None if is_linear else forward, hidden, targets, positions, shape
    )
    try:
        yield
    finally:
        del head.forward
        if former is not None:
            head.forward = former


def _sum_at_head(
    model: nn.Module,
    head: nn.Module,
    forward: Callable | None,
    hidden: Tensor,
    targets: Tensor,
    positions: Tensor,
    shape: Sequence[int],
) -> Tensor:
    """Return the summed loss of hidden states `[B, L, H]`, inside the head's call.

    Args:
        forward: of a head that is more than a linear layer.
        targets: [n] labels.
        positions: [n] int64, the positions that predict them, counted through all of [B, L].
        shape: (B, L) of the labels.
    """
    if tuple(hidden.shape[:2]) != tuple(shape):
        raise ValueError(
            f"labels are {list(shape)} and the head gets hidden states {list(hidden.shape[:2])}: give a "
            "label for every token, and no logits_to_keep"
        )
    use_liger, block_logits, _ = model._text_loss
    hidden = hidden.flatten(0, 1).index_select(0, positions)
    if forward is not None:
        _log_once(
            hidden.device.type, f"checkpointed chunks of {type(head).__name__}, which is more than a linear layer"
        )
        vocabulary = model.config.get_text_config().vocab_size
        in_step = any(hasattr(p, "ds_id") for p in head.parameters())  # ZeRO-3; FSDP gathers for the head's call
        return _sum_in_chunks(forward, hidden, targets, max(1, block_logits // vocabulary), in_step)
    why_not = liger.get_refusal(hidden.device.type) if use_liger else "model.liger is false"
    how = "Liger's fused linear cross-entropy" if why_not is None else f"blocks of the vocabulary in torch ({why_not})"
    _log_once(hidden.device.type, how)
    arguments = hidden, head.weight, targets, head.bias, block_logits
    # Liger divides by zero without a token, and gives the weight no gradient where the hidden states need none.
    without_gradient = torch.is_grad_enabled() and not hidden.requires_grad
    if why_not is None and len(targets) and not without_gradient:
        return _sum_by_liger(*arguments)
    return linear_cross_entropy_sum(*arguments)


def _sum_in_chunks(forward: Callable, hidden: Tensor, targets: Tensor, tokens: int, in_step: bool) -> Tensor:
    """Return the summed loss of any head, chunks of `tokens` tokens at a time; backward calls the head again.

    in_step: each call gathers weights from all ranks, so that all ranks make the same number, the last ones empty.
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


def _sum_by_liger(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, block_logits: int) -> Tensor:
    """Return the summed loss by Liger, which makes the gradients in its forward.

    Weight gradients are added up in fp32 over Liger's chunks of tokens. `block_logits` sets their size (at least N · H
    logits): Liger's own is 8 tokens for 300 of a 7B model, and each chunk reads the whole weight.
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
        ignore_index=IGNORED_LABEL,
        reduction="sum",
        accum_dtype=torch.float32,
        chunk_mem_const=max(1, -(-vocabulary // (width * chunks))),
    )
    call.apply_defaults()
    return Function.apply(*call.args[1:])[0]


@functools.cache
def _log_once(device_type: str, how: str) -> None:
    """Write one log line per process and choice."""
    logger.info("text loss on %s: %s", device_type, how)
