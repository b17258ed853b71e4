"""The processes of a run: each takes its share of the records, and the first merges the results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")

# A rank may have long clips where another has short ones, and waits for it at the end.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is, and where its model goes."""

    rank: int
    size: int
    device: str

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """This rank's part."""
        return things[self.rank :: self.size]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            torch.distributed.barrier()


@contextlib.contextmanager
def running_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started, connected while the block runs; a single one without torchrun.

    Results travel by files in a folder that all ranks see, so that gloo does on GPUs too.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)  # Triton launches on the current device
    if size == 1:
        yield Ranks(0, 1, device)
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, size, device)
    finally:
        torch.distributed.destroy_process_group()
