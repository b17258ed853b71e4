"""Values for programs that read some back: PyTorch's own operators are also computed on the CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten
# What they return has a size that follows from values: on a GPU the host waits for it.
_SIZED_BY_VALUES = (aten.nonzero, aten.repeat_interleave, aten._unique2, aten.unique_consecutive)
_SIZED_BY_VALUES += (aten.masked_select, aten.masked_scatter_backward)
_LARGE = 2**26  # elements


class CpuValues(TorchDispatchMode):
    """Gives the results of operators of `aten` the values that the CPU computes, beside the launches of the GPU.

    Results of other operators (Triton kernels, flash attention), and of those that draw random numbers on the GPU, are
    filled with zeros. The host's waits inside operators whose sizes follow from values are counted, once each.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, FakeTensor) for kind in types):
            return function(*args, **kwargs)
        if not any(isinstance(x, Tensor) and x.is_cuda for x in tree_iter((args, kwargs))):
            if not str(kwargs.get("device", "")).startswith("cuda"):
                return function(*args, **kwargs)
        if function._overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            args = (args[0], self._as_numbers(args[1]), *args[2:])
        if function._overloadpacket in _SIZED_BY_VALUES and kwargs.get("output_size") is None:
            _count_wait(str(function))
            return tree_map(_to_device, function(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs)))
        result = function(*args, **kwargs)
        if function.is_view:
            return result
        if function._schema.is_mutable:
            self._compute(function, args, kwargs)
            return result
        computed = iter(list(tree_iter(self._compute(function, args, kwargs))))
        for mine in tree_iter(result):
            theirs = next(computed, None)
            if isinstance(mine, Tensor):
                if isinstance(theirs, Tensor):
                    _on_cpu(mine).copy_(theirs)
                elif mine.numel() < _LARGE:  # zeros take room
                    _on_cpu(mine).zero_()
        return result

    def _compute(self, function, args, kwargs):
        """Return the result on the CPU, None if the CPU has no such operator; of a mutable one, in the same memory."""
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        if function.namespace != "aten" or is_random or "empty" in str(function):
            return None
        try:
            return function(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        except NotImplementedError:
            return None

    def _as_numbers(self, indices):
        """Return indices by bool masks as indices by number, as the GPU finds them, which waits."""
        found = []
        for index in indices:
            if isinstance(index, Tensor) and index.is_cuda and index.dtype in (torch.bool, torch.uint8):
                _count_wait("aten.nonzero")
                found += [_to_device(column) for column in _on_cpu(index).nonzero().T]
            else:
                found.append(index)
        return found


def _count_wait(name: str) -> None:
    ctypes.CDLL(None).pretend_count(3, name.encode(), ctypes.c_size_t(0))


def _on_cpu(value):
    """Return a CPU tensor on the memory of one on the pretend GPU, "cpu" for its device, all else as it is."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(flat, value.storage_offset(), value.shape, value.stride())


def _to_device(value):
    if not isinstance(value, Tensor):
        return value
    there = torch.empty_like(value, device="cuda")
    _on_cpu(there).copy_(value)
    return there
