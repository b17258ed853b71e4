"""Ranks that share one sample, and what they exchange.

Every rank's loss is its share, and the sum over the ranks is the whole: backward of each exchange is its adjoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import _functional_collectives as collectives

# its name from torch 2.14 on
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


@dataclass(frozen=True)
class SequenceGroup:
    """A group of ranks that work on the same samples.

    Attributes:
        ranks: P, how many there are.
        rank: this one, in [0, P).
        process_group: of torch; None: the default group.
    """

    ranks: int
    rank: int
    process_group: Any = None

    @classmethod
    def of_world(cls, ranks: int) -> SequenceGroup:
        """Divide all ranks into groups of neighbours and return this rank's. All ranks call it together.

        Raises:
            ValueError: `ranks` does not divide their number.
        """
        world, own = dist.get_world_size(), dist.get_rank()
        if world % ranks:
            raise ValueError(f"{world} ranks cannot be divided into groups of {ranks}")
        groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, world, ranks)]
        return cls(ranks, own % ranks, groups[own // ranks])

    def __deepcopy__(self, memo):
        return self

    def count_part(self, length: int) -> int:
        """Return the tokens of a rank's part of so many, the last part filled up."""
        return -(-length // self.ranks)

    def get_part(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's part of a tensor, filled up with zeros to a multiple of P along `dim`."""
        dim %= tensor.ndim
        length = self.count_part(tensor.shape[dim])
        missing = length * self.ranks - tensor.shape[dim]
        if missing:
            tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing))
        return tensor.narrow(dim, self.rank * length, length)

    def is_same(self, number: int, device: torch.device) -> bool:
        """Tell whether all ranks call this with the same number, of up to 62 bits. Waits for the device."""
        bounds = torch.tensor([number, -number], device=device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self._group())
        return bool(bounds.sum() == 0)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return what all ranks call this with, in their order; picklable."""
        found = [None] * self.ranks
        dist.all_gather_object(found, value, group=self._group())
        return found

    def exchange(self, parts: Tensor) -> Tensor:
        """Send the r-th part [P, …] to rank r, and return what all ranks sent here, in their order [P, …]."""
        flat = parts.contiguous().flatten(0, 1)
        return collectives.all_to_all_single_autograd(flat, None, None, self._group()).view(parts.shape)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Join the tensors of all ranks, of one shape, along `dim`; backward adds up the ranks' gradients."""
        return _all_gather(tensor.contiguous(), dim, self._group())

    def gather_rows(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """Join the tensors of all ranks, which have `counts[r]` rows."""
        most = max(counts)
        padded = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, most - len(tensor)))
        whole = self.gather(padded, 0).split(most)
        return torch.cat([rows[:count] for rows, count in zip(whole, counts, strict=True)])

    def exchange_rows(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the first `sent[0]` rows to rank 0, the next to rank 1, and return what all ranks sent here."""
        return collectives.all_to_all_single_autograd(rows.contiguous(), received, sent, self._group())

    def add(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all ranks, on which all ranks' losses depend alike."""
        return _Add.apply(tensor, self)

    def _group(self) -> Any:
        return dist.group.WORLD if self.process_group is None else self.process_group


class _Add(Function):
    """Sum over the ranks. Its adjoint is a sum too, of gradients that are equal on all ranks: P times one of them."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: SequenceGroup) -> Tensor:
        ctx.ranks = group.ranks
        total = tensor.clone()
        if total.numel():
            dist.all_reduce(total, group=group._group())
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.ranks, None
