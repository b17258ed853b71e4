"""Counts the bytes that Triton kernels load and store while they run in the interpreter (TRITON_INTERPRET=1).

    with count_bytes() as traffic:
        loss.backward()
    for row in traffic.rows(): ...

Two figures per launch and argument: *issued*, every unmasked element of every load and store, and *unique*, every
address once per launch. What a GPU moves lies between the two: a second read of an address costs nothing if a cache
still has it. Torch operations between the launches (fills, copies) are counted as well, as whole tensors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch._library import custom_ops
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter


@dataclass(frozen=True)
class Row:
    """Bytes of one argument in one launch, or of one torch operation (`tensor` is then "out" or "in")."""

    launch: int  # 0, 1, … in the order of execution
    kernel: str
    tensor: str
    access: str  # "load" or "store"
    issued: int
    unique: int


class Traffic:
    """Bytes moved, launch by launch."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._launches = 0
        self._current: _Launch | None = None

    def rows(self) -> list[Row]:
        return list(self._rows)

    def total(self, *, kernel: str | None = None, tensor: str | None = None, access: str | None = None) -> Row:
        """The sum over all rows that match; of unique bytes, too, launch by launch."""
        chosen = [
            row
            for row in self._rows
            if kernel in (None, row.kernel) and tensor in (None, row.tensor) and access in (None, row.access)
        ]
        issued, unique = sum(row.issued for row in chosen), sum(row.unique for row in chosen)
        return Row(-1, kernel or "*", tensor or "*", access or "*", issued, unique)

    def _begin(self, name: str, arguments: dict[str, torch.Tensor]) -> None:
        self._current = _Launch(self._launches, name, arguments)
        self._launches += 1

    def _end(self) -> None:
        self._rows += self._current.rows()
        self._current = None

    def _access(self, access: str, addresses: np.ndarray, mask: np.ndarray) -> None:
        self._current.add(access, np.asarray(addresses)[np.broadcast_to(mask, np.shape(addresses)).astype(bool)])

    def _torch(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        for tensor, access, tensors in (("in", "load", inputs), ("out", "store", outputs)):
            size = sum(t.numel() * t.element_size() for t in tensors)
            if size:
                self._rows.append(Row(self._launches, name, tensor, access, size, size))
        self._launches += 1


class _Launch:
    """One launch: its tensors by the addresses that they span, and which of their elements were touched."""

    def __init__(self, index: int, kernel: str, arguments: dict[str, torch.Tensor]) -> None:
        self.index, self.kernel = index, kernel
        self.spans: list[tuple[str, int, int, int]] = []  # name, first address, end, element size
        for name, tensor in arguments.items():
            if not tensor.numel():
                continue
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = tensor.data_ptr() + (last + 1) * tensor.element_size()
            self.spans.append((name, tensor.data_ptr(), end, tensor.element_size()))
        self.issued: dict[tuple[str, str], int] = {}
        self.touched: dict[tuple[str, str], np.ndarray] = {}

    def add(self, access: str, addresses: np.ndarray) -> None:
        if not addresses.size:
            return
        addresses = addresses.astype(np.int64)
        name, start, end, size = self._span(addresses)
        elements = (addresses - start) // size
        key = (name, access)
        if key not in self.touched:
            self.touched[key] = np.zeros((end - start) // size, dtype=bool)
            self.issued[key] = 0
        self.issued[key] += addresses.size * size
        self.touched[key][elements] = True

    def _span(self, addresses: np.ndarray) -> tuple[str, int, int, int]:
        """The argument that spans all the addresses; the narrowest, where arguments lie inside one another."""
        low, high = int(addresses.min()), int(addresses.max())
        found = [span for span in self.spans if span[1] <= low and high < span[2]]
        if not found:
            raise IndexError(
                f"kernel {self.kernel} touches addresses outside its arguments {[s[0] for s in self.spans]}"
            )
        return min(found, key=lambda span: span[2] - span[1])

    def rows(self) -> Iterator[Row]:
        sizes = {name: size for name, _, _, size in self.spans}
        for (name, access), touched in self.touched.items():
            unique = int(np.count_nonzero(touched)) * sizes[name]
            yield Row(self.index, self.kernel, name, access, self.issued[name, access], unique)


class _TorchOperations(TorchDispatchMode):
    """Torch operations that move data; views and allocations do not."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator := custom_ops.OPDEFS.get(func._schema.name):  # of our own: what counts is inside
            with self:
                return operator._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _MOVE_NOTHING:
            inputs = [] if name in _ONLY_WRITE else _tensors(args) + _tensors(kwargs)
            self.traffic._torch(f"torch.{name}", inputs, _tensors(result))
        return result


_MOVE_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
_ONLY_WRITE = {
    "zero_",
    "fill_",
    "zeros",
    "zeros_like",
    "new_zeros",
    "full",
    "full_like",
    "new_full",
    "ones",
    "ones_like",
}


def _flat(arguments: dict) -> Iterator[tuple[str, object]]:
    """Arguments by name; those in a tuple as name[0], name[1] …"""
    for name, value in arguments.items():
        if isinstance(value, tuple):
            yield from ((f"{name}[{index}]", part) for index, part in enumerate(value))
        else:
            yield name, value


def _tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Counts in all interpreted kernels, and all torch operations of this thread, inside the block."""
    traffic = Traffic()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    cas, rmw = builder.create_atomic_cas, builder.create_atomic_rmw

    def counting_load(self, ptrs, mask, *rest, **named):  # plain and descriptor loads come through here as well
        traffic._access("load", ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest, **named)

    def counting_store(self, ptrs, value, mask, *rest, **named):
        traffic._access("store", ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest, **named)

    def no_atomics(self, *_, **__):
        raise NotImplementedError("atomic operations are not counted")

    def counting_launch(self, *args, **kwargs):
        known = {name: value for name, value in kwargs.items() if name in self.arg_names}
        arguments = inspect.getcallargs(self.fn, *args, **known)
        tensors = {name: value for name, value in _flat(arguments) if isinstance(value, torch.Tensor)}
        with _disable_current_modes():
            traffic._begin(self.fn.__name__, tensors)
            launch(self, *args, **kwargs)
            traffic._end()

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    builder.create_atomic_cas = builder.create_atomic_rmw = no_atomics
    executor.__call__ = counting_launch
    try:
        with _TorchOperations(traffic):
            yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_cas, builder.create_atomic_rmw = cas, rmw
        executor.__call__ = launch
