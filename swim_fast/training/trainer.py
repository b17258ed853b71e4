"""SWIM's training step: one forward, two losses, both normalised over the global step."""

from signal import Signals

from torch import Tensor
from transformers import PrinterCallback, ProgressCallback

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.batch.packing import PackingSampler
from swim_fast.loss.mask_loss import GridPredictions, MaskTargets, compute_pair_losses
from swim_fast.loss.metrics import METRICS, sum_metrics
from swim_fast.options import AttentionLoss
from swim_fast.training.callbacks import BackwardWhereTrained, EarlyStopping, StopOnSignal, StopOnSkipped
from swim_fast.training.flops import StepFlops, get_peak_flops
from swim_fast.training.hf_hooks import HookedTrainer
from swim_fast.training.nonfinite import FiniteGuard
from swim_fast.training.progress import ProgressLines
from swim_fast.training.skipped import SampleReport, SkipLimit
from swim_fast.training.sums import Sums


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
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.batch_sampler, self.train_collator = batch_sampler, train_collator
        self.batch_timeout = batch_timeout
        self.loss_options = loss
        self.learning_rates = learning_rates or {}
        self.guard = FiniteGuard(self.accelerator, self.args.output_dir, on_nan)
        self.report = SampleReport(self.args.output_dir, self.args.process_index)
        self.peak_flops = get_peak_flops(self.args.device)
        self._count_flops = StepFlops(self.model)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the counts of the global step itself
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
        self.report.write(step - 1, inputs["problems"], inputs["notes"])
        self.skip_limit.note(inputs["problems"])
        text, mask, sums, outputs = self._forward(model, inputs)
        labels, pairs = num_items_in_batch.clamp(min=1).to(text.dtype)
        loss = self.args.world_size * self._weigh(text / labels, mask / pairs)
        reason = self.guard.check_loss(loss, text / labels, mask / pairs, step, samples)
        if reason is not None:
            self._skip(samples, reason)
            # an empty batch in its place: forward and backward are collective
            inputs = self._prepare_inputs(self.data_collator([]))
            text, mask, sums, outputs = self._forward(model, inputs)
            loss = self._weigh(text, mask)
        if self._steps_in_backward and self.accelerator.sync_gradients:  # the step's last micro-batch
            self.guard.check_step(None, step)
        if self.peak_flops:
            sums.flops = sum(self._count_flops(inputs["counts"]))
        self.sums += sums
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model, batch) -> tuple[Tensor, Tensor, Sums, object]:
        """Return text loss and mask loss of a batch, summed, with graph; all its sums; and the model's outputs."""
        text_inputs = {"labels": batch["labels"], "label_positions": batch["label_positions"], "num_items_in_batch": 1}
        queries = {} if self.loss_options is None else {"noun_queries": batch["noun_queries"], "right_padded": True}
        inputs = {**model_inputs(batch, dtype=self.model.dtype), **queries, **text_inputs}
        outputs = model(**inputs, use_cache=False)
        if outputs.logits.ndim:
            raise RuntimeError("the model answered all logits: call attach_text_loss(model) before training")
        text = outputs.loss  # the sum over the labels, divided by the number of items
        mask, metrics = self._compare_maps(outputs.attentions or (), batch["mask_targets"], text)
        return text, mask, Sums.from_batch(batch, text, mask, metrics), outputs

    def _compare_maps(self, maps, targets: MaskTargets, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed mask loss, and the sums of the metrics [4]; zeros without maps."""
        loss = self.loss_options
        if not maps:
            if loss is not None and len(targets) and loss.mask_weight > 0:
                raise RuntimeError(
                    f"the mask loss is on (mask_weight {loss.mask_weight}) and this batch has {len(targets)} targets, "
                    "but the model answered no map: call attach_noun_attention(model) before training"
                )
            return like.new_zeros(()), like.new_zeros(len(METRICS) + 1)
        if loss.mask_weight == 0:
            maps = [layer.detach() for layer in maps]
        choices = {"fusion": loss.fusion, "prediction": loss.prediction, "backend": loss.backend}
        predictions = GridPredictions.from_maps(maps, targets, **choices)
        metrics = sum_metrics(predictions)
        if loss.fusion == "none":  # of each layer, as the loss is
            metrics = metrics.mean(0)
        return compute_pair_losses(predictions, loss.criterion, loss.resolution).sum(), metrics

    def _weigh(self, text, mask):
        if self.loss_options is None:
            return text
        return self.loss_options.text_weight * text + self.loss_options.mask_weight * mask

    def _skip(self, samples: list[str], reason: str) -> None:
        self.sums.skipped += len(samples)
        self.report.write(self.state.global_step, [f"{sample}: {reason}" for sample in samples])
