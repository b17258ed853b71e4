"""Callbacks of the trainer."""

import logging
import signal
from collections.abc import Callable

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from swim_fast.training.skipped import SkipLimit

logger = logging.getLogger(__name__)


class EpochOfSampler(TrainerCallback):
    """Sets the sampler's epoch, which accelerate does not do through the loader of a resumed epoch."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class BackwardWhereTrained(TrainerCallback):
    """Keeps activation checkpointing from sending gradients through frozen parts.

    transformers lets the embeddings of words and of patches require gradients, also where they are frozen. Only
    reentrant checkpointing needs that; otherwise backward would recompute a frozen vision tower for nothing.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.gradient_checkpointing and not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False):
            model.disable_input_require_grads()


class EarlyStopping(EarlyStoppingCallback):
    """Ends the run after a number of evaluations without a better `metric_for_best_model`.

    Each evaluation set is reported by itself; those without the metric are ignored.
    """

    @property
    def patience_lost(self) -> bool:
        """True once it has ended the run."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class StopOnSkipped(TrainerCallback):
    """Ends the run, before the step's checkpoint, where too many samples are left out.

    Args:
        limit: to hold the run to.
        count: returns the samples of the last step, and those left out, of all ranks.
    """

    def __init__(self, limit: SkipLimit, count: Callable[[], tuple[int, int]]):
        self.limit, self._count = limit, count

    def on_step_end(self, args, state, control, **kwargs):
        saving = control.should_save or control.should_training_stop
        self.limit.check_step(state.global_step, *self._count(), saving)


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM (preemption) end the run after the current step, with a checkpoint to resume from.

    A second Ctrl-C stops at once. All ranks agree on the step, whichever of them was told.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.received = None
        self.stopped_by: signal.Signals | None = None  # on every rank, whichever was told
        self._previous = {}

    def _remember(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                return

    def on_step_end(self, args, state, control, **kwargs):
        signals = (signal.SIGTERM, signal.SIGINT)
        told = [float(self.received == number) for number in signals]
        if args.world_size > 1:
            told = self.accelerator.reduce(torch.tensor(told, device=args.device), "sum").tolist()
        if any(told):
            self.stopped_by = next(number for number, ranks in zip(signals, told, strict=True) if ranks)
            if state.is_world_process_zero:
                text = "%s: saving a checkpoint at step %d, then stopping"
                logger.warning(text, self.stopped_by.name, state.global_step)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
