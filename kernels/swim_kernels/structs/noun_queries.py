"""Attention rows to compute, and the keys that they are read out on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from swim_kernels.runtime.transfer import move_together, pin_together
from swim_kernels.structs.key_columns import KeyColumns, find_key_columns, find_members

OVER = ("range", "set")
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class NounQueries:
    """R tagged query tokens (rows) of a batch of B sequences of L tokens, and the G key sets they are read out on.

    All fields are int32 or int64 tensors on one device. Construction checks what can be known without reading values
    back from the device: types, shapes, dtypes, devices. `check` looks at the values.

    Attributes:
        sequence: [R] batch element of the row, in [0, B).
        position: [R] token position of the row, in [0, L).
        key_start: [R] first key of the row's softmax. Above 0 for left padding, packed neighbours, sliding windows.
        key_end: [R] end (exclusive) of the row's softmax; `position + 1` is the causal softmax of the model.
        key_set: [R] the row of `key_sets` that this row is read out on, in [0, G).
        key_sets: [G, N] key positions in [0, L), −1 where there is none: padding, or a cell without a token. A key may
            be named more than once: every column is a read-out of its own, and their gradients add up. Keys outside
            [key_start, key_end) of a row have probability 0 there, and no gradient.
        over: keys of a row's softmax: "range", [key_start, key_end), or "set", its key set, each key once, however
            often it is named; key_start and key_end do not matter then.

    Raises:
        TypeError: a field is no tensor, or neither int32 nor int64.
        ValueError: shapes or devices do not go together, or an unknown `over`.
    """

    sequence: Tensor
    position: Tensor
    key_start: Tensor
    key_end: Tensor
    key_set: Tensor
    key_sets: Tensor
    over: str = "range"

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise ValueError(f"NounQueries.over is {self.over!r}: choose one of {', '.join(OVER)}")
        for name, tensor in self._named():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"NounQueries.{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype not in _INTEGERS:
                raise TypeError(f"NounQueries.{name} must be int32 or int64, got {tensor.dtype}")
            if tensor.device != self.sequence.device:
                raise ValueError(
                    f"NounQueries.{name} is on {tensor.device}, sequence on {self.sequence.device}: "
                    "all fields must be on one device"
                )
            ndim, layout = (2, "[G, N]") if name == "key_sets" else (1, "[R]")
            if tensor.ndim != ndim:
                raise ValueError(f"NounQueries.{name} must be {layout}, got shape {list(tensor.shape)}")
            if ndim == 1 and len(tensor) != len(self.sequence):
                raise ValueError(
                    f"NounQueries.{name} has {len(tensor)} rows, sequence has {len(self.sequence)}: one entry per row"
                )
        if len(self) and not len(self.key_sets):
            raise ValueError(f"NounQueries has {len(self)} rows but no key set to read them on: key_sets is [0, N]")

    def __len__(self) -> int:
        """R, the number of rows."""
        return len(self.sequence)

    @property
    def device(self) -> torch.device:
        return self.sequence.device

    @cached_property
    def ranges(self) -> str:
        """Kind of all softmax ranges: "prefix", the row's own token and all before it; "causal", they end
        at the row's own token; "any", of key sets too.

        Looks at the values, once; on an accelerator it waits for the device, unless the rows came there by `to`.
        """
        if self.over == "set" or bool((self.key_end != self.position + 1).any()):
            return "any"
        return "causal" if bool(self.key_start.any()) else "prefix"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NounQueries:
        """Return the same rows on another device; the rows on the CPU are remembered as their `source`."""
        return self._like(move_together(self.tensors(), device, non_blocking))

    def pin_memory(self) -> NounQueries:
        """Return the same rows in page-locked memory; `torch.utils.data.DataLoader(pin_memory=True)` calls this."""
        return self._like(pin_together(self.tensors()))

    @property
    def source(self) -> NounQueries | None:
        """These rows on the CPU, if they came from there by `to` and were not written to since.

        None while a CUDA graph is captured: a replay would copy the rows of the capture.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        known, versions = self.__dict__.get("_source", (None, ()))
        return known if known is not None and versions == self.versions() else None

    def versions(self) -> tuple[int, ...] | None:
        """Return how often each tensor was written to; None if that is not counted, as under `inference_mode`."""
        if any(tensor.is_inference() for tensor in self.tensors()):
            return None
        return tuple(tensor._version for tensor in self.tensors())

    def key_columns(self, length: int) -> KeyColumns:
        """Return which columns name which of `length` keys. On the CPU remembered; `Collator` asks in its worker."""
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            return find_key_columns(self.key_sets, length)
        which = (length, self.key_sets._version)
        if which not in self._key_columns:
            self._key_columns[which] = find_key_columns(self.key_sets, length)
        return self._key_columns[which]

    def within_window(self, window: int) -> NounQueries:
        """Return the same rows, each with its own token and at most `window` − 1 keys before it; `ranges` stays.

        Remembered, since the layers of a model share it and backends remember what they prepared for an object. A
        softmax over a key set is not the model's own and stays.
        """
        if self.over == "set":
            return self
        if window not in self._narrowed:
            if self.source is not None:
                narrow = self._with_ranges_of(self.source.within_window(window))
            else:
                start = torch.maximum(self.key_start, self.position + 1 - window)
                narrow = self._with_ranges(start, self.key_end)
            narrow.__dict__["ranges"] = self.ranges  # within the window
            self._narrowed[window] = narrow
        return self._narrowed[window]

    def within_key_sets(self) -> NounQueries:
        """Return the same rows, their ranges cut to the span of the keys on which they are read out; remembered.

        No softmax any more: for what concerns these keys only, given lse. A row without a key gets an empty range.
        """
        if "key sets" not in self._narrowed:
            if self.source is not None:
                narrow = self._with_ranges_of(self.source.within_key_sets())
            else:
                first, end = (bound[self.key_set] for bound in self._spans)
                start = torch.minimum(torch.maximum(self.key_start, first), self.key_end)
                end = torch.maximum(torch.minimum(self.key_end, end), start)
                narrow = self._with_ranges(start, end)
            self._narrowed["key sets"] = narrow
        return self._narrowed["key sets"]

    def _with_ranges(self, start: Tensor, end: Tensor) -> NounQueries:
        """Return the same rows with other softmax ranges; what is known of the key sets stays known."""
        other = replace(self, key_start=start, key_end=end)
        other.__dict__["_key_columns"] = self._key_columns
        return other

    def _with_ranges_of(self, source: NounQueries) -> NounQueries:
        """Return the same rows with the ranges of other rows on the CPU, which are remembered as the source."""
        other = self._with_ranges(*move_together((source.key_start, source.key_end), self.device))
        other.__dict__["_source"] = (source, other.versions())
        return other

    def reach(self) -> tuple[Tensor, Tensor]:
        """Return first and end key of the softmax of each row, [R] each: its range, or the span of its key set."""
        if self.over == "range" or not len(self):
            return self.key_start, self.key_end
        first, end = (bound[self.key_set] for bound in self._spans)
        return torch.minimum(first, end), end

    def members(self, length: int) -> Tensor:
        """Return True for those of `length` keys that are in the key set of a row: bool [R, L]."""
        return find_members(self.key_sets.index_select(0, self.key_set), length)

    @cached_property
    def has_gaps(self) -> bool:
        """True if some key set is no block of neighbouring keys. Looks at the values, once."""
        if not self.key_sets.numel():
            return False
        keys = self.key_sets.sort(dim=1).values
        distinct = (keys >= 0).sum(dim=1) - ((keys[:, 1:] == keys[:, :-1]) & (keys[:, 1:] >= 0)).sum(dim=1)
        first, end = self._spans
        return bool((distinct < end - torch.minimum(first, end)).any())

    @cached_property
    def _spans(self) -> tuple[Tensor, Tensor]:
        """First and end key of each key set, [G] each; of an empty one a large number and 0."""
        keys = self.key_sets
        far = torch.iinfo(keys.dtype).max
        if not keys.shape[1]:
            return keys.new_full(keys.shape[:1], far), keys.new_zeros(keys.shape[:1])
        return keys.masked_fill(keys < 0, far).amin(dim=1), keys.amax(dim=1) + 1

    @cached_property
    def _key_columns(self) -> dict[tuple[int, int], KeyColumns]:
        return {}

    @cached_property
    def _narrowed(self) -> dict[int | str, NounQueries]:
        return {}

    def _like(self, tensors: Sequence[Tensor]) -> NounQueries:
        moved = NounQueries(*tensors, over=self.over)
        if self.device.type == "cpu" or "ranges" in self.__dict__:
            moved.__dict__["ranges"] = self.ranges
        source = self.source or (self if self.device.type == "cpu" else None)
        if source is not None and moved.versions() is not None:
            moved.__dict__["_source"] = (source, moved.versions())
        return moved

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the six tensors in the order of the constructor."""
        return tuple(tensor for _, tensor in self._named())

    def check(self, batch: int, length: int) -> None:
        """Refuse values that do not fit B = `batch` sequences of L = `length` tokens.

        Reads the values, so on an accelerator it waits for the device: call it on the CPU, before the tensors move.
        `noun_attention` calls it for tensors on the CPU only.

        Raises:
            ValueError: naming the first row, or place in `key_sets`, that is wrong.
        """
        self._check_rows("sequence", (self.sequence < 0) | (self.sequence >= batch), f"is outside [0, {batch})")
        self._check_rows("position", (self.position < 0) | (self.position >= length), f"is outside [0, {length})")
        if self.over == "range":
            self._check_rows("key_start", self.key_start < 0, "is negative")
            self._check_rows("key_end", self.key_end > length, f"is past the end of the sequence, {length}")
            self._check_rows("key_end", self.key_end <= self.key_start, "leaves no key: it must be above key_start")
        count = len(self.key_sets)
        self._check_rows("key_set", (self.key_set < 0) | (self.key_set >= count), f"is outside [0, {count})")

        keys = self.key_sets
        bad = (keys < -1) | (keys >= length)
        if bad.any():
            g, n = bad.nonzero()[0].tolist()
            raise ValueError(
                f"NounQueries.key_sets[{g}, {n}] = {keys[g, n].item()} is neither in [0, {length}) nor -1, "
                "which is no key"
            )

    def _check_rows(self, name: str, bad: Tensor, problem: str) -> None:
        if bad.any():
            row = bad.nonzero()[0].item()
            value = getattr(self, name)[row].item()
            raise ValueError(f"NounQueries, row {row}: {name} {value} {problem}")

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "over"]
