"""All that this project overrides of `transformers.Trainer` (5.17 to 5.24).

| method | why | test |
|---|---|---|
| `compute_loss` (trainer.py) | two losses over the global step | test_equivalence |
| `_get_num_items_in_batch` | labels and pairs of all micro-batches and ranks | test_equivalence |
| `create_optimizer`, `_get_learning_rate` | learning rates of parts, and their log | test_optimization |
| `_get_grad_norm` | a gradient that is not finite never reaches the optimizer | test_survival |
| `_get_train_sampler`, `get_train_dataloader` | mixtures, packed batches, workers that outlive signals | test_packing |
| `get_train_dataloader`, `get_batch_samples` | ranks of a sample have the same batches | test_sequence_parallel |
| `get_eval_dataloader`, `evaluation_loop` | each sample once; losses and metrics summed over ranks | test_equivalence |
| `get_batch_samples` | a loader that has died or hangs is told with its remedy | test_loader |
| `_prepare_inputs`, `log` (mixin.py) | moves queries and targets too; adds `summarize` | test_run |
| `summarize`, `_init_training_state` | averages and speed since the last log | test_run |
| `_load_from_checkpoint`, `_load_best_model` | weights under published names, adapters | test_equivalence, test_fsdp |
| `_init_training_state` (checkpoints.py) | a finished run that is resumed trains no further step | test_survival |
| `_load_optimizer_and_scheduler` (checkpoints.py) | several ranks on the CPU | test_survival |
| `_save` (checkpoints.py) | a tied head once, the published names | test_fsdp, test_sequence_parallel |
| `_save_optimizer_and_scheduler` (checkpoints.py) | no second file of weights | test_fsdp |
| `_get_output_dir`, `_push_from_checkpoint`, `_save_checkpoint` (checkpoints.py) | whole checkpoints or none | \
test_checkpoints |
"""

import functools
import itertools
import logging
import math
import time
from collections.abc import Sequence

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset
from transformers.trainer_utils import EvalLoopOutput

from swim_fast.data.batch.collation import Collator
from swim_fast.data.batch.counts import fingerprint
from swim_fast.data.batch.dataset import MixtureSampler
from swim_fast.data.batch.workers import start_worker
from swim_fast.data.sample.builder import Sample
from swim_fast.data.source.errors import DataError
from swim_fast.loss.targets import MaskTargets
from swim_fast.modeling.adapters import has_adapters, read_adapters
from swim_fast.modeling.freezing import get_part_parameters
from swim_fast.modeling.sequence_group import SequenceGroup
from swim_fast.training.arguments import get_data_seed
from swim_fast.training.callbacks import EpochOfSampler
from swim_fast.training.checkpoints import CheckpointingTrainer
from swim_fast.training.fsdp import load_full_state, load_weights
from swim_fast.training.loader import explain_loader
from swim_fast.training.mixin import AttentionLossMixin
from swim_fast.training.parameter_groups import split_groups
from swim_fast.training.step import StepLosses, compute_losses, count_items, weigh_losses
from swim_fast.training.sums import Sums

logger = logging.getLogger(__name__)


class HookedTrainer(AttentionLossMixin, CheckpointingTrainer):
    """Overrides of transformers around the step, which `SwimTrainer` defines."""

    sequence_group: SequenceGroup | None

    # optimizer

    def create_optimizer(self, model=None):
        """Return transformers' optimizer, its groups split where parts of the model have their own learning rates."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not existed and self.learning_rates:
            split_groups(optimizer, get_part_parameters(self.model), self.learning_rates)
        return optimizer

    def _get_learning_rate(self) -> float:
        """Return the rate of the parts without their own, for the log; the others' are kept for `log`."""
        rates = {group.get("part"): group["lr"] for group in self.optimizer.param_groups}
        self._part_rates = {f"learning_rate_{part}": float(rates[part]) for part in self.learning_rates}
        return super()._get_learning_rate()

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the gradient's norm, just before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        refused = None if self._steps_in_backward else self.guard.check_step(norm, self.state.global_step + 1)
        if refused is not None:
            self._skip(*refused)
            for parameter in model.parameters():
                parameter.grad = None  # an optimizer passes over what has none
        return norm

    @property
    def _steps_in_backward(self) -> bool:
        """True where the losses must be checked before backward: DeepSpeed steps in it, and fp16 scales the gradient,
        whose norm may be infinite."""
        return self.is_deepspeed_enabled or self.args.fp16

    def _get_num_items_in_batch(self, batch_samples, device) -> Tensor:
        """Return `count_items` of the global step: of all its micro-batches on all ranks.

        A single rank's stay on the CPU: dividing by them does not wait for the device. The samples of the step, and
        those left out, travel along.
        """
        counts = [(len(batch["samples"]) + len(batch["problems"]), len(batch["problems"])) for batch in batch_samples]
        total = torch.cat([count_items(batch_samples), torch.tensor(counts).sum(0)])
        if self.args.world_size > 1:
            total = total.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else total
            total = self._reduce(total) // self._ranks_of_sample
        items, self._samples_of_step = total.split((3, 2))
        return items

    # checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Load the weights of a checkpoint folder as `from_pretrained` does.

        transformers 5.17 hands the file's tensors to `load_state_dict` under their names in the file. Those of
        Qwen2.5-VL are the published ones and not the module's, so that nothing would be loaded, with a warning only.
        (With DeepSpeed the engine restores the weights and this is not called.) Where adapters are trained, they alone
        are saved and loaded.
        """
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        if has_adapters(model):
            saved = read_adapters(model, resume_from_checkpoint)
            if self.is_fsdp_enabled:
                load_full_state(model, saved, strict=False)
            else:
                model.load_state_dict(saved, strict=False)
            return
        if self.is_fsdp_enabled:
            load_weights(model, resume_from_checkpoint)
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
        sampler = MixtureSampler(self.train_dataset, get_data_seed(self.args))
        self.add_callback(EpochOfSampler(sampler))
        return sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return transformers' loader, or one of packed batches, which the sampler has dealt to the ranks already."""
        if self.batch_sampler is None and self.sequence_group is not None:
            return self._build_train_loader(self._deal_batches(), self.data_collator)
        if self.batch_sampler is None:
            loader = super().get_train_dataloader()
            inner = getattr(loader, "base_dataloader", loader)  # accelerate's wraps the one that is iterated
            inner.timeout = self.batch_timeout if inner.num_workers else 0
            inner.worker_init_fn = functools.partial(start_worker, inner.worker_init_fn)
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
        return self._build_train_loader(sampler, self.train_collator)

    def _deal_batches(self) -> BatchSamplerShard:
        """Return the batches of this rank's group, as accelerate deals them to ranks that share nothing."""
        batches = BatchSampler(self._get_train_sampler(), self._train_batch_size, self.args.dataloader_drop_last)
        return BatchSamplerShard(batches, *self._share)

    def _build_train_loader(self, batches, collate: Collator) -> DataLoader:
        """Return a loader of batches that are dealt out already."""
        args = self.args
        return DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=functools.partial(start_worker, None),
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            timeout=self.batch_timeout if args.dataloader_num_workers else 0,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step and its counts, as transformers does; a dead loader ends in one line."""
        with explain_loader():
            return super().get_batch_samples(map(self._agree, epoch_iterator), num_batches, device)

    @property
    def _share(self) -> tuple[int, int]:
        """Into how many shares data is dealt, and the number of this rank's."""
        return self.args.world_size // self._ranks_of_sample, self.args.process_index // self._ranks_of_sample

    @property
    def _ranks_of_sample(self) -> int:
        return 1 if self.sequence_group is None else self.sequence_group.ranks

    @property
    def _counts_samples(self) -> bool:
        """True of the one rank of those that share a sample which counts and reports it."""
        return self.sequence_group is None or self.sequence_group.rank == 0

    def _agree(self, batch: dict) -> dict:
        """Return a batch if all ranks that share it have the same; else one that trains nothing, with the reason."""
        group = self.sequence_group
        if group is None or group.is_same(fingerprint(batch), self.args.device):
            return batch
        names, problems = zip(*group.gather_objects((batch["samples"], batch["problems"])), strict=True)
        told = list(dict.fromkeys(itertools.chain(*problems)))
        for name in dict.fromkeys(itertools.chain(*names)):
            if not any(problems) or all(name in of_rank for of_rank in names):
                told.append(f"{name}: left out with its batch, which the ranks that share it have read differently")
        return self.data_collator([DataError(text) for text in told])

    def _report(self, step: int, problems: list[str], notes: Sequence[str] = ()) -> None:
        if self._counts_samples:
            self.report.write(step, problems, notes)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Return the loader of this rank's share of an evaluation set, each sample exactly once."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        shares, own = self._share
        share = Subset(dataset, range(own, len(dataset), shares))
        return DataLoader(
            share,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=functools.partial(start_worker, None),
            timeout=self.batch_timeout if self.args.dataloader_num_workers else 0,
        )

    # evaluation and logging

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Return text loss, mask loss and grounding metrics over a whole set, summed over the ranks."""
        # rank 0 has the largest share; the others end with empty batches, since the forward may be collective
        steps = -(-len(dataloader.dataset.dataset) // self._share[0])
        steps = -(-steps // dataloader.batch_size)
        model = self._get_evaluated_model()
        self.callback_handler.eval_dataloader = dataloader
        with explain_loader():
            sums, batches = Sums(), iter(dataloader)
        for _ in range(steps):
            with explain_loader():
                batch = next(batches, None)
            batch = self._prepare_inputs(self._agree(batch or self.data_collator([])))
            self._report(self.state.global_step, batch["problems"], batch["notes"])
            with torch.no_grad(), self.compute_loss_context_manager():
                sums += compute_losses(model, batch, self.attention_loss, self.sequence_group).sums
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = self._total(sums).average()
        losses = StepLosses(*(metrics.get(f"{name}_loss", 0.0) for name in StepLosses._fields))
        metrics["loss"] = weigh_losses(losses, self.attention_loss)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    def _get_evaluated_model(self):
        model = self._wrap_model(self.model, training=False)
        model.eval()
        return model

    @torch.no_grad()
    def compute_maps(self, samples: list[Sample]) -> tuple[Sequence[Tensor], MaskTargets]:
        """Return the maps [R, N] of a batch by layer, and its targets, of the model as evaluation sees it.

        All ranks must take part; without samples a rank takes an empty batch.
        """
        batch = self._prepare_inputs(self._agree(self.data_collator(samples)))
        model = self._get_evaluated_model()
        with self.compute_loss_context_manager():
            outputs = compute_losses(model, batch, self.attention_loss, self.sequence_group).outputs
        return outputs.attentions or (), batch["mask_targets"]

    def _init_training_state(self, *args) -> tuple[int, int]:
        begun = super()._init_training_state(*args)
        self._first_step = self.state.global_step
        self.start_interval()  # from the step that is resumed
        return begun

    @property
    def trained(self) -> bool:
        """True once a step was done, beside those of the checkpoint that was resumed."""
        return self.state.global_step > self._first_step

    def count_skipped(self) -> int:
        """Return the samples that training has left out, those of resumed checkpoints' logs too; all ranks together."""
        logged = sum(log.get("skipped", 0) for log in self.state.log_history if "learning_rate" in log)
        return logged + int(self._total(self.sums).skipped)

    def start_interval(self) -> None:
        """Start the sums of the next training log."""
        self.sums = Sums()
        self._since = time.perf_counter(), self.state.global_step

    def summarize(self, total: Sums) -> dict[str, float]:
        """Return averages, rates and speed since the last training log."""
        since, step = self._since
        averages = total.average()
        averages["pairs_per_step"] = averages.pop("pairs") / max(self.state.global_step - step, 1)
        seconds = time.perf_counter() - since
        logs = self._part_rates | averages | {"tokens_per_second": round(total.tokens / seconds, 1)}
        logs["padding_share"] = round(1 - total.tokens / max(total.token_slots, 1), 4)
        if self.peak_flops:
            logs["mfu"] = round(total.flops / seconds / (self.args.world_size * self.peak_flops), 4)
        self.start_interval()
        return logs
