"""The attention loss for any subclass of `transformers.Trainer`: TRL's, ms-swift's, LLaMA-Factory's, this project's."""

from __future__ import annotations

import logging

from accelerate.utils import send_to_device
from torch import Tensor

from swim_fast.errors import OptionError
from swim_fast.options import AttentionLoss
from swim_fast.training.step import compute_losses, count_items
from swim_fast.training.sums import Sums

logger = logging.getLogger(__name__)


class AttentionLossMixin:
    """Replaces a trainer's loss by the weighted text and mask loss over the global step.

    Put it before the trainer among the bases: `class Trainer(AttentionLossMixin, SFTTrainer)`. The model must have been
    through `swim_fast.modeling.prepare.prepare_model`, and batches must be those of `Collator`. Both losses and the
    grounding metrics are logged with each training loss; records that were left out are logged as warnings.

    Attributes:
        attention_loss: weights and choices of the mask loss; None: the text loss alone.
        sums: since the last training log.

    Raises:
        OptionError: an argument of the trainer that would drop inputs or that this loss would pass over.
    """

    attention_loss: AttentionLoss | None = AttentionLoss()
    sums = Sums()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _refuse_arguments(self)
        self.model_accepts_loss_kwargs = True  # else the loss would be divided by the accumulation steps once more

    def _get_num_items_in_batch(self, batch_samples, device) -> Tensor:
        """Return `count_items` of the global step: of all its micro-batches on all ranks."""
        return self._reduce(count_items(batch_samples).to(device))

    def _prepare_inputs(self, inputs):
        # transformers moves tensors only, and leaves the rest to accelerate's loaders
        return super()._prepare_inputs(send_to_device(inputs, self.args.device, non_blocking=True))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a micro-batch: micro-batches add up, and ranks average, to that of the global step."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        for problem in inputs["problems"]:
            logger.warning("left out: %s", problem)
        losses = compute_losses(model, inputs, self.attention_loss)
        if model.training:
            self.sums += losses.sums
        loss = self.args.world_size * losses.weigh(num_items_in_batch, self.attention_loss)
        return (loss, losses.outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs) -> None:
        """Add what `summarize` makes of the sums since the last training log."""
        if "loss" in logs and "learning_rate" in logs:
            total, self.sums = self._total(self.sums), Sums()
            logs |= self.summarize(total)
        super().log(logs, *args, **kwargs)

    def summarize(self, total: Sums) -> dict[str, float]:
        """Return what a training log says of the sums of all ranks: losses, metrics, pairs."""
        return total.average()

    def _total(self, sums: Sums) -> Sums:
        """Add up the sums of all ranks, as numbers."""
        return Sums.from_tensor(self._reduce(sums.to_tensor(self.args.device)))

    def _reduce(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums


def _refuse_arguments(trainer) -> None:
    args, parallel = trainer.args, getattr(trainer.accelerator, "parallelism_config", None)
    if args.remove_unused_columns:
        raise OptionError("remove_unused_columns is true, which takes queries and targets away: set it to False")
    if args.label_smoothing_factor:
        raise OptionError(
            f"label_smoothing_factor is {args.label_smoothing_factor} and the text loss has no smoothing: remove it"
        )
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise OptionError("compute_loss_func is given and the attention loss takes its place: remove it")
    if args.n_gpu > 1:
        raise OptionError(f"one process sees {args.n_gpu} GPUs and a process trains on one: start it with torchrun")
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise OptionError("parallelism_config divides samples or weights among ranks; every rank needs whole samples")
