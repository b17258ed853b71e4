"""transformers' Trainer with SWIM's two losses, both normalised over the global step."""

import functools
import json
import logging
import math
import time
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from swim_fast.config import AttentionLossConfig
from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.batch.dataset import MixtureSampler
from swim_fast.data.batch.packing import PackingSampler
from swim_fast.data.batch.workers import start_worker
from swim_fast.loss.mask_loss import GridPredictions, compute_pair_losses
from swim_fast.loss.metrics import sum_metrics
from swim_fast.modeling.adapters import has_adapters, load_adapters
from swim_fast.modeling.freezing import get_part_parameters
from swim_fast.modeling.text_loss import count_labels
from swim_fast.options import METRICS
from swim_fast.training.callbacks import (
    BackwardWhereTrained,
    EarlyStopping,
    EpochOfSampler,
    StopOnSignal,
)
from swim_fast.training.checkpoints import CheckpointingTrainer
from swim_fast.training.flops import StepFlops, peak_flops
from swim_fast.training.nonfinite import FiniteGuard
from swim_fast.training.parameter_groups import divide_groups

logger = logging.getLogger(__name__)

# What batches add up. All are sums, so that micro-batches, ranks and logging intervals simply add.
SUMS = ("text_loss", "mask_loss", *METRICS, "grounded_pairs", "labels", "pairs", "tokens", "places", "skipped")

NOTES_LOGGED = 20  # such as "thinned from 32 to 18 frames"; a long-video run has one for every sample


def data_seed(args: TrainingArguments) -> int:
    """Seed of the order of the samples."""
    return args.seed if args.data_seed is None else args.data_seed


class SwimTrainer(CheckpointingTrainer):
    """Trains on the batches of `swim_fast.data`.

    Loss of one optimizer step, over all its micro-batches and ranks:
    `text_weight · Σ token losses / number of labels + mask_weight · Σ pair losses / number of pairs`.

    Args:
        loss: weights and choices of the mask loss.
        on_nan: what becomes of a micro-batch whose loss, or a step whose gradient, is NaN or infinite: "stop" ends the
            run before the optimizer; "skip" leaves it out on all ranks. Both need one small reduction among the ranks,
            and one wait for the device, per micro-batch. Which sample a gradient comes from is not known: all those of
            the step are named. With DeepSpeed the engine checks the gradient and leaves the step out itself; with fp16
            that is how the loss scale is found, so that gradients are not checked here.
        learning_rates: of parts of the model, see `get_part_parameters`; the others have `args.learning_rate`.
        batch_sampler: batches of packed samples to train on, with `train_collator`, which packs them; None: batches of
            `per_device_train_batch_size` samples, of `data_collator`, as for evaluation.
        kwargs: as of `transformers.Trainer`; `data_collator([])` must give a batch that counts nothing.
    """

    def __init__(
        self,
        *,
        loss: AttentionLossConfig,
        on_nan: str = "stop",
        learning_rates: dict[str, float] | None = None,
        batch_sampler: PackingSampler | None = None,
        train_collator: Collator | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.batch_sampler, self.train_collator = batch_sampler, train_collator
        self.loss_options = loss
        self.learning_rates = learning_rates or {}
        self._guard = FiniteGuard(self.accelerator, self.args.output_dir, on_nan)
        self._step_samples = (-1, [])  # step, and the samples it has had so far
        self._peak = peak_flops(self.args.device)
        self._count_flops = StepFlops(self.model)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the counts of the global step itself
        self.add_callback(StopOnSignal(self.accelerator))
        self.add_callback(BackwardWhereTrained())
        self._skipped = Path(self.args.output_dir) / f"skipped-rank{self.args.process_index}.jsonl"
        self._notes = 0
        self._start_interval()

    @property
    def stopped_early(self) -> bool:
        """Whether evaluations without progress have ended the run."""
        return any(isinstance(c, EarlyStopping) and c.patience_lost for c in self.callback_handler.callbacks)

    # optimizer

    def create_optimizer(self, model=None):
        """transformers' optimizer, its groups divided where parts of the model have learning rates of their own."""
        there_was_one = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not there_was_one and self.learning_rates:
            divide_groups(optimizer, get_part_parameters(self.model), self.learning_rates)
        return optimizer

    def _get_learning_rate(self) -> float:
        """That of the parts without one of their own, for the log; the others' are kept for `log`."""
        rates = {group.get("part"): group["lr"] for group in self.optimizer.param_groups}
        self._rates_of_parts = {f"learning_rate_{part}": float(rates[part]) for part in self.learning_rates}
        return super()._get_learning_rate()

    # one step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a micro-batch, such that micro-batches add up, and ranks average, to the loss of the global step."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        self._report(inputs)
        text, mask, sums, outputs = self._forward(model, inputs)
        labels, pairs = num_items_in_batch.clamp(min=1).to(text.dtype)
        loss = self.args.world_size * self._weigh(text / labels, mask / pairs)
        if self._guard.loss_is_finite(loss):
            self._remember_samples(inputs["samples"])
        else:
            self._leave_out(inputs["samples"], text / labels, mask / pairs)
            # once more with nothing in it: what is collective, forward and backward, happens on every rank
            inputs = self._prepare_inputs(self.data_collator([]))
            text, mask, sums, outputs = self._forward(model, inputs)
            loss = self._weigh(text, mask)
        self._sums += sums
        if self._peak:
            self._flops += sum(self._count_flops(inputs))
        return (loss, outputs) if return_outputs else loss

    def _remember_samples(self, samples: list[str]) -> None:
        step, before = self._step_samples
        self._step_samples = (self.state.global_step, samples if step != self.state.global_step else before + samples)

    def _leave_out(self, samples: list[str], text, mask) -> None:
        """A micro-batch whose loss is not finite on some rank: raises, or puts its samples among the skipped."""
        what = f"the loss is not finite (text loss {text.item():.4g}, mask loss {mask.item():.4g})"
        at_fault = not torch.isfinite(self._weigh(text, mask)).item()
        self._skip(samples, self._guard.refuse("loss", what, self.state.global_step + 1, samples, at_fault))

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient's norm, just before the optimizer's step; a gradient that is not finite never gets there."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16 and not self._guard.gradient_is_finite(norm):
            step, samples = self._step_samples
            samples = samples if step == self.state.global_step else []
            what = "the gradient is not finite (the losses are)"
            self._skip(samples, self._guard.refuse("gradient", what, self.state.global_step + 1, samples))
            for parameter in model.parameters():
                parameter.grad = None  # an optimizer passes over what has none
        return norm

    def _skip(self, samples: list[str], reason: str) -> None:
        self._sums[SUMS.index("skipped")] += len(samples)
        self._write_skipped([f"{sample}: {reason}" for sample in samples])

    def _weigh(self, text, mask):
        return self.loss_options.text_weight * text + self.loss_options.mask_weight * mask

    def _get_num_items_in_batch(self, batch_samples, device) -> Tensor:
        """Labels and pairs `[2]` of the global step: all its micro-batches on all ranks."""
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batch_samples:
            counts[0] += count_labels(batch["labels"]).to(device)
            counts[1] += len(batch["mask_targets"])
        return self.accelerator.reduce(counts, "sum") if self.args.world_size > 1 else counts

    def _forward(self, model, batch):
        """Sums over one batch: text loss and mask loss (with graph), all `SUMS` (detached), and the model's outputs."""
        labels, queries, targets, problems = (
            batch[key] for key in ("labels", "noun_queries", "mask_targets", "problems")
        )
        inputs = model_inputs(batch)
        if self.loss_options.layers != []:  # else the model is a stock one
            inputs["noun_queries"] = queries
        outputs = model(**inputs, labels=labels, num_items_in_batch=1, use_cache=False)
        text = outputs.loss  # the sum over the labels
        if outputs.logits.ndim:
            raise RuntimeError("the model answered all logits: call attach_text_loss(model) before training")
        mask, grounding = text.new_zeros(()), text.new_zeros(len(METRICS) + 1)
        options = self.loss_options
        if outputs.attentions:
            maps = outputs.attentions if options.mask_weight > 0 else [m.detach() for m in outputs.attentions]
            predictions = GridPredictions.from_maps(
                maps, targets, fusion=options.fusion, numerics=options.numerics, backend=options.backend
            )
            mask = compute_pair_losses(predictions, options.criterion, options.resolution).sum()
            grounding = sum_metrics(predictions)
        elif len(targets) and options.mask_weight > 0:
            raise RuntimeError(
                f"the mask loss is on (mask_weight {options.mask_weight}) and this batch has {len(targets)} targets, "
                "but the model answered no map: call attach_noun_attention(model) before training"
            )
        places = batch["input_ids"].numel()
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else places  # a packed batch has no padding
        counts = (count_labels(labels), len(targets), tokens, places, len(problems))
        sums = [text, mask, *grounding, *(torch.as_tensor(count, device=text.device) for count in counts)]
        return text, mask, torch.stack([value.detach().double() for value in sums]), outputs

    # checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Weights of a checkpoint folder, loaded as `from_pretrained` loads them.

        transformers 5.17 hands the file's tensors to `load_state_dict` under the names they have in the file. Those of
        Qwen2.5-VL are the published ones and not the module's, so that nothing would be loaded, with a warning only.
        (With DeepSpeed the engine restores the weights and this is not called.) Where adapters are trained, they alone
        are saved and loaded.
        """
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        if has_adapters(model):
            load_adapters(model, resume_from_checkpoint)
            return
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    # data

    def _get_train_sampler(self, train_dataset=None):
        sampler = MixtureSampler(self.train_dataset, data_seed(self.args))
        self.add_callback(EpochOfSampler(sampler))
        return sampler

    def get_train_dataloader(self) -> DataLoader:
        """As transformers makes it; for packed batches one that accelerate leaves alone, since the sampler has dealt
        them to the ranks already."""
        if self.batch_sampler is None:
            loader = super().get_train_dataloader()
            loader.worker_init_fn = functools.partial(start_worker, loader.worker_init_fn)
            return loader
        args, sampler = self.args, self.batch_sampler
        if args.max_steps > 0:
            sampler.set_steps(args.max_steps * args.gradient_accumulation_steps)
        else:
            sampler.epochs = math.ceil(args.num_train_epochs)
        self.add_callback(EpochOfSampler(sampler))
        if self.is_world_process_zero():
            text = "packing: %d batches of up to %d tokens per rank and epoch, %.1f %% full"
            logger.info(text, len(sampler), sampler.max_tokens, 100 * sampler.efficiency())
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.train_collator,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=functools.partial(start_worker, None),
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def _prepare_inputs(self, inputs):
        # transformers moves tensors only, and leaves the rest to accelerate's loaders.
        return super()._prepare_inputs(send_to_device(inputs, self.args.device))

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Every rank's own share of an evaluation set, each sample exactly once."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        share = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        return DataLoader(
            share,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=functools.partial(start_worker, None),
        )

    def _report(self, batch) -> None:
        """Say what was left out of a batch and, of the first samples, what was changed to fit."""
        for note in batch["notes"]:
            self._notes += 1
            logger.log(logging.INFO if self._notes <= NOTES_LOGGED else logging.DEBUG, "%s", note)
        self._write_skipped(batch["problems"])

    def _write_skipped(self, problems: list[str]) -> None:
        if not problems:
            return
        self._skipped.parent.mkdir(parents=True, exist_ok=True)
        with self._skipped.open("a", encoding="utf-8") as file:
            for problem in problems:
                logger.warning("skipped: %s", problem)
                file.write(json.dumps({"step": self.state.global_step, "problem": problem}, ensure_ascii=False) + "\n")

    # evaluation and logging

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Text loss, mask loss and grounding metrics over a whole set, summed over the ranks."""
        # rank 0 has the largest share; a rank whose share is used up goes on with empty batches, for the forward may
        # be a collective
        steps = -(-len(dataloader.dataset.dataset) // self.args.world_size)
        steps = -(-steps // dataloader.batch_size)
        model = self._wrap_model(self.model, training=False)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.args.device)
        batches = iter(dataloader)
        for _ in range(steps):
            batch = next(batches, None) or self.data_collator([])
            batch = self._prepare_inputs(batch)
            self._report(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                sums += self._forward(model, batch)[2]
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = self._averages(sums)
        metrics["loss"] = self._weigh(metrics["text_loss"], metrics.get("mask_loss", 0.0))
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    def _averages(self, sums: Tensor) -> dict[str, float]:
        """Means over all ranks: text loss per label, mask loss per pair, metrics per pair with a mask to be found."""
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        averages = {"text_loss": total["text_loss"] / max(total["labels"], 1)}
        if total["pairs"]:
            averages["mask_loss"] = total["mask_loss"] / total["pairs"]
        if total["grounded_pairs"]:
            averages |= {name: total[name] / total["grounded_pairs"] for name in METRICS}
        if total["skipped"]:
            averages["skipped"] = int(total["skipped"])
        return averages | {"pairs": int(total["pairs"])}

    def _init_training_state(self, *args) -> tuple[int, int]:
        begun = super()._init_training_state(*args)
        self._start_interval()  # from the step that is resumed
        return begun

    def _start_interval(self):
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.args.device)
        self._flops = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._since = (time.perf_counter(), self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the training log what was summed since the last one."""
        if "loss" in logs and "learning_rate" in logs:
            since, step = self._since
            averages = self._averages(self._sums)
            averages["pairs_per_step"] = averages.pop("pairs") / max(self.state.global_step - step, 1)
            used = torch.stack([self._sums[SUMS.index("tokens")], self._sums[SUMS.index("places")], self._flops])
            used = self.accelerator.reduce(used, "sum") if self.args.world_size > 1 else used
            tokens, places, flops = used.tolist()
            seconds = time.perf_counter() - since
            logs |= self._rates_of_parts
            logs |= averages | {"tokens_per_second": round(tokens / seconds, 1)}
            logs["padding_share"] = round(1 - tokens / max(places, 1), 4)
            if self._peak:
                logs["mfu"] = round(flops / seconds / (self.args.world_size * self._peak), 4)
            self._start_interval()
        super().log(logs, start_time)
