"""SWIM's training step: one forward, two losses, both normalised over the global step."""

from signal import Signals

from transformers import PrinterCallback, ProgressCallback

from swim_fast.data.batch.collation import Collator
from swim_fast.data.batch.packing import PackingSampler
from swim_fast.modeling.sequence_group import SequenceGroup
from swim_fast.options import AttentionLoss
from swim_fast.training.callbacks import BackwardWhereTrained, EarlyStopping, StopOnSignal, StopOnSkipped
from swim_fast.training.flops import StepFlops, get_peak_flops
from swim_fast.training.hf_hooks import HookedTrainer
from swim_fast.training.nonfinite import FiniteGuard
from swim_fast.training.progress import ProgressLines
from swim_fast.training.skipped import SampleReport, SkipLimit
from swim_fast.training.step import compute_losses, weigh_losses


class SwimTrainer(HookedTrainer):
    """Trainer on the batches of `swim_fast.data`.

    Loss of one optimizer step, over all its micro-batches and ranks:
    `text_weight · Σ token losses / number of labels + mask_weight · Σ pair losses / number of pairs`.

    Args:
        loss: weights and choices of the mask loss; None: train on text alone, without maps.
        on_nan: "stop" ends the run before the optimizer's step if a loss or gradient is NaN or infinite; "skip" leaves
            the micro-batch or step out on all ranks. This costs one small reduction among the ranks and one wait for
            the device, for each step ("stop") or micro-batch ("skip"). A gradient is reported with all samples of its
            step. DeepSpeed checks gradients and leaves steps out itself; so does fp16, to find its loss scale.
        max_skipped: share of samples that may be left out for their problems, see `SkipLimit`.
        batch_timeout: seconds to wait for a batch of the data workers, see `explain_loader`.
        learning_rates: of parts of the model, see `get_part_parameters`; the others have `args.learning_rate`.
        batch_sampler: batches of packed samples to train on, with `train_collator`, which packs them; None: batches of
            `per_device_train_batch_size` samples, of `data_collator`, as for evaluation.
        sequence_group: ranks that share each sample, to which the model was prepared; None: every rank has its own.
        kwargs: as of `transformers.Trainer`; `data_collator([])` must give a batch that counts nothing.
    """

    def __init__(
        self,
        *,
        loss: AttentionLoss | None,
        on_nan: str = "stop",
        max_skipped: float = 0.2,
        batch_timeout: float = 900.0,
        learning_rates: dict[str, float] | None = None,
        batch_sampler: PackingSampler | None = None,
        train_collator: Collator | None = None,
        sequence_group: SequenceGroup | None = None,
        **kwargs,
    ):
        self.sequence_group = sequence_group
        super().__init__(**kwargs)
        self.batch_sampler, self.train_collator = batch_sampler, train_collator
        self.batch_timeout = batch_timeout
        self.attention_loss = loss
        self.learning_rates = learning_rates or {}
        self.guard = FiniteGuard(self.accelerator, self.args.output_dir, on_nan)
        self.report = SampleReport(self.args.output_dir, self.args.process_index)
        self.peak_flops = get_peak_flops(self.args.device)
        self._count_flops = StepFlops(self.model)
        self.skip_limit = SkipLimit(max_skipped)
        self._signals = StopOnSignal(self.accelerator)
        self.add_callback(self._signals)
        for library in (PrinterCallback, ProgressCallback):  # one of which the trainer has
            self.remove_callback(library)
        self.add_callback(ProgressLines())
        self.add_callback(StopOnSkipped(self.skip_limit, lambda: self._samples_of_step.tolist()))
        self.add_callback(BackwardWhereTrained())
        self.start_interval()

    @property
    def stopped_early(self) -> bool:
        """True once evaluations without progress have ended the run."""
        return any(isinstance(c, EarlyStopping) and c.patience_lost for c in self.callback_handler.callbacks)

    @property
    def stopped_by(self) -> Signals | None:
        """Signal that has ended the run, the same on all ranks."""
        return self._signals.stopped_by

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a micro-batch: micro-batches add up, and ranks average, to that of the global step."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        step, samples = self.state.global_step + 1, inputs["samples"]
        self._report(step - 1, inputs["problems"], inputs["notes"])
        self.skip_limit.note(inputs["problems"])
        losses = compute_losses(model, inputs, self.attention_loss, self.sequence_group)
        parts = losses.divide(num_items_in_batch)
        loss = self.args.world_size * weigh_losses(parts, self.attention_loss)
        reason = self.guard.check_loss(loss, parts.text, parts.mask, step, samples)
        if reason is not None:
            self._skip(samples, reason)
            # an empty batch in its place: forward and backward are collective
            inputs = self._prepare_inputs(self.data_collator([]))
            losses = compute_losses(model, inputs, self.attention_loss, self.sequence_group)
            loss = losses.weigh(num_items_in_batch, self.attention_loss)
        if self._steps_in_backward and self.accelerator.sync_gradients:  # the step's last micro-batch
            self.guard.check_step(None, step)
        if self.peak_flops and self._counts_samples:
            losses.sums.flops = sum(self._count_flops(inputs["counts"]))
        self.sums += losses.sums
        return (loss, losses.outputs) if return_outputs else loss

    def _skip(self, samples: list[str], reason: str) -> None:
        if self._counts_samples:
            self.sums.skipped += len(samples)
        self._report(self.state.global_step, [f"{sample}: {reason}" for sample in samples])
