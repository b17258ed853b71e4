"""SWIM's step for any training loop: one forward, two losses, both normalised over the global step.

    items = count_items(batches)                                    # of this rank; add up those of all ranks
    for batch in batches:                                           # micro-batches of one optimizer step
        losses = compute_losses(model, batch, options)
        (ranks * losses.weigh(items, options)).backward()           # ranks: where gradients are averaged over them

The sum over micro-batches, averaged over ranks, is
`text_weight · Σ token losses / labels + mask_weight · Σ pair losses / pairs`, however the samples are dealt out, and
where they are asked for, the losses of questions (`swim_fast.loss.avar`) over the samples with a question.
`SwimTrainer`, `AttentionLossMixin` and the examples use these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swim_fast.data.batch.collation import model_inputs
from swim_fast.loss.avar import compute_question_losses
from swim_fast.loss.mask_loss import GridPredictions, MaskTargets, compute_pair_losses
from swim_fast.loss.metrics import METRICS, sum_metrics
from swim_fast.modeling.noun_attention import ReentrantCheckpointingError
from swim_fast.modeling.sequence_group import SequenceGroup
from swim_fast.options import AttentionLoss
from swim_fast.training.sums import Sums


class StepLosses(NamedTuple):
    """Losses of a step or a part of it, scalars or numbers."""

    text: Any
    mask: Any
    image: Any = 0.0
    system: Any = 0.0


@dataclass(frozen=True, eq=False)
class BatchLosses:
    """Losses of one micro-batch, summed, with their graphs.

    Attributes:
        text: scalar, the sum over the labels.
        mask: scalar, the sum over the pairs; 0 without maps.
        questions: [2], AVAR's image and system loss, summed over the samples with a question; 0 where not asked for.
        sums: both losses, the sums of the metrics, and what the batch holds, without graph; they add up.
        outputs: of the model.
    """

    text: Tensor
    mask: Tensor
    questions: Tensor
    sums: Sums
    outputs: Any

    def divide(self, items: Tensor) -> StepLosses:
        """Return this batch's part of the global step's losses: per label, per pair, and per sample with a question.

        Args:
            items: labels, pairs and such samples of the global step [3], see `count_items`.
        """
        labels, pairs, questions = items.clamp(min=1).to(self.text.dtype)
        return StepLosses(self.text / labels, self.mask / pairs, *(self.questions / questions))

    def weigh(self, items: Tensor, loss: AttentionLoss | None) -> Tensor:
        """Return this batch's part of the global step's loss, a scalar. Arguments as for `divide`, `weigh_losses`."""
        return weigh_losses(self.divide(items), loss)


def count_items(batches: Iterable[dict[str, Any]]) -> Tensor:
    """Return the labels, pairs and samples with a question `[3]` of a rank's batches of one step, int64 on the CPU.

    Adding those of all ranks is left to the caller: `accelerator.reduce(count_items(batches).to(device), "sum")`.
    """
    counts = [(batch["counts"].labels, len(batch["mask_targets"]), len(batch["questions"])) for batch in batches]
    return torch.tensor(counts, dtype=torch.int64).reshape(-1, 3).sum(0)


def weigh_losses(losses: StepLosses, loss: AttentionLoss | None) -> Any:
    """Return the weighted sum of the losses, of numbers or tensors; None: the text loss alone."""
    if loss is None:
        return losses.text
    total = loss.text_weight * losses.text + loss.mask_weight * losses.mask
    if not loss.asks_questions:
        return total
    return total + loss.image_weight * losses.image + loss.system_weight * losses.system


def compute_losses(
    model: nn.Module, batch: dict[str, Any], loss: AttentionLoss | None, group: SequenceGroup | None = None
) -> BatchLosses:
    """Run a prepared model on a batch and return both losses, summed.

    Args:
        model: after `swim_fast.modeling.prepare.prepare_model`, bare or wrapped (DDP, DeepSpeed, FSDP2, PEFT).
        batch: of `Collator`, on the model's device.
        loss: weights and choices of the mask loss; None: no maps are asked for.
        group: ranks that share the batch, to which the model was prepared. The losses are this rank's share, and
            what the batch holds is counted by the first of them.

    Raises:
        RuntimeError: the model was not prepared: it answers all logits, or no map for targets that are trained on; or
            a trainer has replaced its forward since.
        ReentrantCheckpointingError: the maps have lost their graph.
    """
    text_inputs = {"labels": batch["labels"], "label_positions": batch["label_positions"], "num_items_in_batch": 1}
    queries: dict[str, Any] = {}
    if loss is not None:
        queries = {"noun_queries": batch["noun_queries"], "right_padded": True}
    if loss is not None and loss.asks_questions:
        queries |= {"mass_queries": batch["questions"].queries, "mass_sets": batch["questions"].sets}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())  # a wrapper has no `dtype`
    outputs = model(**model_inputs(batch, dtype=dtype), **queries, **text_inputs, use_cache=False)
    if outputs.logits is None:
        raise RuntimeError(
            "the model's forward was replaced by one that computes the text loss itself: leave such an option of the "
            "trainer out (TRL before 1.15: loss_type='chunked_nll', its default)"
        )
    if outputs.logits.ndim:
        raise RuntimeError("the model answered all logits: call attach_text_loss(model) before training")
    text = outputs.loss  # the sum over the labels, divided by the number of items
    maps, asked = outputs.attentions or (), text.new_zeros(2)
    if "mass_queries" in queries and maps:
        maps, masses = zip(*maps, strict=True)
        if len(batch["questions"]):
            _check_graph(masses, text)
        asked = compute_question_losses(masses, batch["questions"].queries.key_set, batch["questions"].sizes).sum(1)
    mask, metrics = _compare_maps(maps, batch["mask_targets"], loss, text)
    sums = Sums.from_batch(batch, text, mask, asked, metrics)
    if group is not None:  # each has all maps, and the labels of its part
        mask, asked = mask / group.ranks, asked / group.ranks
        sums = sums if group.rank == 0 else Sums(text_loss=sums.text_loss)
    return BatchLosses(text, mask, asked, sums, outputs)


def _compare_maps(
    maps: Sequence[Tensor], targets: MaskTargets, loss: AttentionLoss | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed mask loss, and the sums of the metrics [4]; zeros without maps."""
    if not maps:
        if loss is not None and len(targets) and loss.mask_weight > 0:
            raise RuntimeError(
                f"the mask loss is on (mask_weight {loss.mask_weight}) and this batch has {len(targets)} targets, "
                "but the model answered no map: call attach_noun_attention(model) before training"
            )
        return like.new_zeros(()), like.new_zeros(len(METRICS) + 1)
    if loss.mask_weight == 0:
        maps = [layer.detach() for layer in maps]
    elif len(targets):
        _check_graph(maps, like)
    choices = {"fusion": loss.fusion, "prediction": loss.prediction, "backend": loss.backend}
    predictions = GridPredictions.from_maps(maps, targets, **choices)
    metrics = sum_metrics(predictions)
    if loss.fusion == "none":  # of each layer, as the loss is
        metrics = metrics.mean(0)
    return compute_pair_losses(predictions, loss.criterion, loss.resolution).sum(), metrics


def _check_graph(layers: Sequence[Tensor], text: Tensor) -> None:
    """Raise ReentrantCheckpointingError where what the layers answered has lost the graph that the text loss has."""
    if text.requires_grad and not any(layer.requires_grad for layer in layers):
        raise ReentrantCheckpointingError(
            "the maps have no gradient although the text loss has: reentrant activation checkpointing drops it (use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}), or nothing at or below the layers of the maps is "
            "trained"
        )
