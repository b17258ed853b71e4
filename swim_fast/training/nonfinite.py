"""Losses and gradients that are NaN or infinite: found before the optimizer's step, reported with their samples."""

import torch
from accelerate.utils import gather_object
from torch import Tensor

from swim_fast.errors import UserError
from swim_fast.training.checkpoints import find_last_checkpoint

MOST_IN_A_ROW = 10  # left out one after the other; more are caused by the weights, not the samples
NAMES_SHOWN = 16


class NonFiniteError(UserError, ValueError):
    """The run was stopped at a loss or gradient that is not finite; the message names samples, step and losses."""


class FiniteGuard:
    """Checks losses and gradients, with the same answer on every rank.

    Args:
        accelerator: of the trainer.
        output_dir: of the run, where checkpoints are.
        on_nan: "stop" raises `NonFiniteError` on every rank; "skip" leaves the batch or step out on every rank.
    """

    def __init__(self, accelerator, output_dir: str, on_nan: str):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.on_nan = on_nan
        self._in_a_row = {"loss": 0, "gradient": 0}
        self._step, self._samples = 0, []  # samples of the step so far

    def check_loss(self, loss: Tensor, text: Tensor, mask: Tensor, step: int, samples: list[str]) -> str | None:
        """Return why the samples of a micro-batch are left out, None if its loss is finite on all ranks.

        Costs one reduction of a number among the ranks and one wait for the device.

        Args:
            loss, text, mask: scalars: the weighted sum, and the losses to name.
            step: index of the optimizer step, counted from 1.
            samples: names of this rank's samples.

        Raises:
            NonFiniteError: if the run is to stop, or has left out too many in a row.
        """
        bad = (~torch.isfinite(loss.detach())).float()
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, "sum")
        if bad.item() == 0:
            self._in_a_row["loss"] = 0
            self._samples = self._samples + samples if step == self._step else samples
            self._step = step
            return None
        what = f"the loss is not finite (text loss {text.item():.4g}, mask loss {mask.item():.4g})"
        return self._refuse("loss", [] if torch.isfinite(loss).item() else [(what, samples)], step)

    def check_gradient(self, norm: Tensor | float | None, step: int) -> tuple[list[str], str] | None:
        """Return the samples of a step and why it is left out, None if its gradient is finite.

        Waits for the device, once.

        Args:
            norm: of the gradient, the same on all ranks.
            step: index of the optimizer step, counted from 1.

        Raises:
            NonFiniteError: as `check_loss`.
        """
        if norm is None or bool(torch.isfinite(torch.as_tensor(norm))):
            self._in_a_row["gradient"] = 0
            return None
        samples = self._samples if step == self._step else []
        return samples, self._refuse("gradient", [("the gradient is not finite (the losses are)", samples)], step)

    def _refuse(self, kind: str, own: list[tuple[str, list[str]]], step: int) -> str:
        """Return the report on samples that are left out, or raise; all ranks call this together.

        own: what is not finite on this rank, and its samples.
        """
        self._in_a_row[kind] += 1
        found: dict[str, list[str]] = {}
        for what, names in gather_object(own):
            found[what] = found.get(what, []) + names
        told = "; ".join(f"{what} with {_shorten(names)}" for what, names in found.items())
        if self.on_nan == "skip" and self._in_a_row[kind] <= MOST_IN_A_ROW:
            return f"left out of step {step}: {told}"
        last = find_last_checkpoint(self.output_dir)
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


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more if names else "no sample"
