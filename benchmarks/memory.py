"""Memory that a piece of code allocates and that autograd keeps of it, exactly, on the CPU.

Allocated bytes are those that torch's CPU allocator reports to its profiler: every allocation and every release, those
inside an operator as well. Memory that was there before is not counted, nor its release. Saved tensors are those that
autograd keeps for backward, by storage, so that views and tensors saved twice count once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "benchmarks.memory mark "


class Allocations:
    """Bytes of the CPU allocator above the start; filled in at the end of `count_allocations`.

    Attributes:
        peak: the most that was held at any time.
        held: what was held at each `mark`.
        end: what was held at the end.
    """

    peak: int
    end: int
    held: dict[str, int]

    def mark(self, name: str) -> None:
        """Note the bytes held now, under `held[name]`."""
        with record_function(_MARK + name):
            pass

    def _fill(self, events: list[_ProfilerEvent]) -> None:
        held = self.peak = 0
        self.held = {}
        sizes: dict[int, int] = {}  # of the blocks held, by address
        for event in sorted(_flat(events), key=lambda event: event.start_time_ns):
            if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
                size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
                if size > 0:
                    sizes[address] = size
                    held += size
                else:
                    held -= sizes.pop(address, 0)  # 0: from before
                self.peak = max(self.peak, held)
            elif event.name.startswith(_MARK):
                self.held[event.name.removeprefix(_MARK)] = held
        self.end = held


def _flat(events: Iterable[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    stack = list(events)
    while stack:
        event = stack.pop()
        yield event
        stack += event.children


@contextmanager
def count_allocations() -> Iterator[Allocations]:
    """Count what the block allocates. Slows it down: not for timing."""
    counted = Allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield counted
    counted._fill(profiler.profiler.kineto_results.experimental_event_tree())


class SavedTensors:
    """The tensors that autograd saved in `watch_saved`, by storage; those of `given` are left out.

    Storages are held weakly: what autograd lets go of is freed and no longer counted.
    """

    def __init__(self, given: Iterable[Tensor]):
        self._given = {_storage(tensor) for tensor in given}
        self._saved: dict[StorageWeakRef, tuple[int, set[tuple[tuple[int, ...], torch.dtype]]]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if tensor.device.type != "meta" and storage not in self._given:
            _, views = self._saved.setdefault(storage, (tensor.untyped_storage().nbytes(), set()))
            views.add((tuple(tensor.shape), tensor.dtype))

    @property
    def bytes(self) -> int:
        """Of all storages that are still held."""
        return sum(size for storage, (size, _) in self._saved.items() if not storage.expired())

    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return the tensors still held, those of the largest storages first."""
        held = [(size, views) for storage, (size, views) in self._saved.items() if not storage.expired()]
        return [view for _, views in sorted(held, key=lambda item: -item[0]) for view in sorted(views, key=str)]


@contextmanager
def watch_saved(given: Iterable[Tensor] = ()) -> Iterator[SavedTensors]:
    """Watch what autograd saves in the block. What a node keeps past `save_for_backward` is not seen: compare with
    the bytes held according to `count_allocations`."""
    saved = SavedTensors(given)

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor)
        return tensor.detach()  # the tensor itself, if it is the node's own result, would keep the node alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
