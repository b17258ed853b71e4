"""Losses and gradients that are NaN or infinite: found before the optimizer's step, reported with their samples."""

from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from swim_fast.errors import UserError
from swim_fast.training.checkpoints import find_last_checkpoint

MOST_IN_A_ROW = 10  # left out one after the other; more are caused by the weights, not the samples
NAMES_SHOWN = 16


class NonFiniteError(UserError, ValueError):
    """The run was stopped at a loss or gradient that is not finite; the message names samples, step and losses."""


class _Batch(NamedTuple):
    """A micro-batch of the step: the names of its samples and its losses, scalars on the device."""

    samples: list[str]
    loss: Tensor
    text: Tensor
    mask: Tensor

    def describe(self) -> tuple[str, list[str]]:
        """Return what is not finite, and the samples. Waits for the device."""
        losses = f"text loss {self.text.item():.4g}, mask loss {self.mask.item():.4g}"
        return f"the loss is not finite ({losses})", self.samples


class FiniteGuard:
    """Checks losses and gradients, with the same answer on every rank.

    A run that is to stop waits for the device once for each optimizer step. One that leaves samples out waits for each
    micro-batch, since their gradient must not be added to that of the others.

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
        self._step, self._batches = 0, []  # micro-batches of the step so far

    def check_loss(self, loss: Tensor, text: Tensor, mask: Tensor, step: int, samples: list[str]) -> str | None:
        """Return why the samples of a micro-batch are left out, None if they are not.

        Args:
            loss, text, mask: scalars: the weighted sum, and the losses to name.
            step: index of the optimizer step, counted from 1.
            samples: names of this rank's samples.

        Raises:
            NonFiniteError: too many in a row were left out.
        """
        if step != self._step:
            self._step, self._batches = step, []
        batch = _Batch(samples, loss.detach(), text.detach(), mask.detach())
        if self.on_nan == "skip":
            if self._count_ranks(~torch.isfinite(batch.loss))[0]:
                return self._refuse("loss", [batch], step)
            self._in_a_row["loss"] = 0
        self._batches.append(batch)
        return None

    def check_step(self, norm: Tensor | float | None, step: int) -> tuple[list[str], str] | None:
        """Return the samples of a step and why it is left out, None if its losses and gradient are finite.

        To be called before the optimizer's step, on all ranks.

        Args:
            norm: of the gradient, the same on all ranks; None if that is not to be checked.
            step: index of the optimizer step, counted from 1.

        Raises:
            NonFiniteError: the run is to stop, or has left out too many in a row.
        """
        batches = self._batches if step == self._step else []
        checked = [torch.stack([~torch.isfinite(batch.loss) for batch in batches]).any()] if batches else []
        if norm is not None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)  # FSDP's are sharded
            checked.append(~torch.isfinite(norm).to(checked[0].device if checked else norm.device))
        bad = self._count_ranks(*checked)
        if batches and bad[0]:
            self._refuse("loss", batches, step)
        if norm is None or not bad[-1]:
            self._in_a_row["gradient"] = 0
            return None
        return _list_samples(batches), self._refuse("gradient", batches, step)

    def _count_ranks(self, *flags: Tensor) -> list[float]:
        """Return on how many ranks each flag is set. Waits for the device, once."""
        if not flags:
            return []
        counts = torch.stack(flags).float()
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts.tolist()

    def _refuse(self, kind: str, batches: list[_Batch], step: int) -> str:
        """Return the report on samples that are left out, or raise; all ranks call this together."""
        self._in_a_row[kind] += 1
        if kind == "loss":
            own = [batch.describe() for batch in batches if not torch.isfinite(batch.loss).item()]
        else:
            own = [("the gradient is not finite (the losses are)", _list_samples(batches))]
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


def _list_samples(batches: list[_Batch]) -> list[str]:
    return [name for batch in batches for name in batch.samples]


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more if names else "no sample"
