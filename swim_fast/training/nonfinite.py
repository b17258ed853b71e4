"""Losses and gradients that are NaN or infinite: found before the optimizer, told with the samples they come from."""

import torch
from accelerate.utils import gather_object
from torch import Tensor

from swim_fast.training.checkpoints import last_checkpoint

MOST_IN_A_ROW = 10  # micro-batches or steps left out one after the other; more come from the weights, not the samples
NAMES_SHOWN = 16


class NonFiniteError(ValueError):
    """The run was stopped at a loss or gradient that is not finite; the message names samples, step and losses."""


class FiniteGuard:
    """Decides, the same on every rank, what becomes of a micro-batch or step whose loss or gradient is not finite.

    Args:
        accelerator: of the trainer.
        output_dir: of the run, where checkpoints are.
        on_nan: "stop" raises `NonFiniteError` on every rank; "skip" leaves the batch out on every rank.
    """

    def __init__(self, accelerator, output_dir: str, on_nan: str):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.on_nan = on_nan
        self._in_a_row = {"loss": 0, "gradient": 0}

    def loss_is_finite(self, loss: Tensor) -> bool:
        """Whether the loss of this micro-batch, a scalar, is finite on all ranks.

        Costs one reduction of a number among the ranks and one wait for the device, per micro-batch.
        """
        bad = (~torch.isfinite(loss.detach())).float()
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, "sum")
        finite = bad.item() == 0
        if finite:
            self._in_a_row["loss"] = 0
        return finite

    def gradient_is_finite(self, norm: Tensor | float | None) -> bool:
        """Whether the norm of a step's gradient, the same on all ranks, is finite. Waits for the device, once."""
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(norm)))
        if finite:
            self._in_a_row["gradient"] = 0
        return finite

    def refuse(self, kind: str, what: str, step: int, samples: list[str], at_fault: bool = True) -> str:
        """Deal with a loss or gradient that is not finite; all ranks call this together.

        Args:
            kind: "loss" or "gradient".
            what: such as "the loss is not finite (text loss nan, mask loss 0.3)".
            step: optimizer step, counted from 1.
            samples: names of this rank's samples.
            at_fault: whether this rank's own value is the bad one.

        Returns:
            What happened, for the report on each sample that is left out.

        Raises:
            NonFiniteError: if the run is to stop, or has left out too many in a row.
        """
        self._in_a_row[kind] += 1
        found = {}
        for reason, names in gather_object([(what, samples)] if at_fault else []):
            found[reason] = found.get(reason, []) + names
        told = "; ".join(f"{reason} with {_listed(names)}" for reason, names in found.items())
        if self.on_nan == "skip" and self._in_a_row[kind] <= MOST_IN_A_ROW:
            return f"left out of step {step}: {told}"
        last = last_checkpoint(self.output_dir)
        rest = f"; the last checkpoint is {last}" if last else "; there is no checkpoint yet"
        if self.on_nan == "skip":
            raise NonFiniteError(
                f"step {step}: {told}. {MOST_IN_A_ROW} batches before it had to be left out as well, so it is the "
                f"weights rather than the samples: lower training.learning_rate{rest}"
            )
        raise NonFiniteError(
            f"step {step}: {told}. The weights were not changed by it{rest}. Look at these records with `swim-fast "
            "data show`, lower training.learning_rate, or leave such batches out with optimization.on_nan=skip"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more if names else "no sample"
