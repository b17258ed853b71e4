"""Binary masks of any sizes, one bit a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import overload

import torch
from torch import Tensor

FIELDS = 4  # int64 columns of `PackedMasks.table`


@dataclass(frozen=True, eq=False)
class PackedMasks(Sequence[Tensor]):
    """K binary masks, bit-packed: a sequence of bool [H, W], made when it is asked for.

    A row of a mask fills whole bytes, its first pixel in the lowest bit, 0 behind the last one; the rows of a mask lie
    one after the other, and so do the masks. Construction checks what can be known without reading values back.

    Attributes:
        bits: uint8 [bytes].
        table: [K, 4] int64 on the same device: first byte, bytes of a row, height, width.
        sizes: K times (H, W), as Python numbers.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not go together.
    """

    bits: Tensor
    table: Tensor
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.bits.dtype != torch.uint8 or self.table.dtype != torch.int64:
            raise TypeError(
                f"PackedMasks: bits must be uint8 and table int64, got {self.bits.dtype} and {self.table.dtype}"
            )
        num_bytes = sum(height * bytes_of_row(width) for height, width in self.sizes)
        if self.bits.shape != (num_bytes,) or self.table.shape != (len(self), FIELDS):
            raise ValueError(
                f"PackedMasks: {len(self)} masks take bits [{num_bytes}] and table [{len(self)}, {FIELDS}], "
                f"got {list(self.bits.shape)} and {list(self.table.shape)}"
            )
        if self.bits.device != self.table.device:
            raise ValueError(f"PackedMasks: bits are on {self.bits.device}, table on {self.table.device}")

    @classmethod
    def pack(cls, masks: Sequence[Tensor]) -> PackedMasks:
        """Pack uint8 or bool masks [H, W] of one device, any strides; a pixel that is not zero is set.

        No mask gives an empty sequence on the CPU. Nothing is read back from a device.

        Raises:
            TypeError: a mask is no tensor, or neither uint8 nor bool.
            ValueError: a mask is not [H, W] with pixels, or on another device than the first.
        """
        for number, mask in enumerate(masks):
            _check_mask(number, mask, masks[0])
        device = masks[0].device if len(masks) else torch.device("cpu")
        sizes = tuple((mask.shape[0], mask.shape[1]) for mask in masks)
        packed = [_pack(mask).flatten() for mask in masks]
        bits = torch.cat(packed) if packed else torch.empty(0, dtype=torch.uint8)
        return cls(bits, _table(sizes).to(device, non_blocking=True), sizes)

    def __len__(self) -> int:
        """K, the number of masks."""
        return len(self.sizes)

    @overload
    def __getitem__(self, number: int) -> Tensor: ...

    @overload
    def __getitem__(self, number: slice) -> list[Tensor]: ...

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"mask {number} of {len(self)}")
        number %= len(self)
        return self.rows(number, 0, self.sizes[number][0])

    def rows(self, number: int, first: int, end: int) -> Tensor:
        """Return the rows [first, end) of a mask: bool [end - first, W]."""
        width = self.sizes[number][1]
        stride = bytes_of_row(width)
        start = self._first_bytes[number]
        packed = self.bits[start + first * stride : start + end * stride].view(-1, stride, 1)
        if self.device.type == "cpu":
            import numpy

            pixels = numpy.unpackbits(packed.flatten(1).numpy(), axis=1, count=width, bitorder="little")
            return torch.from_numpy(pixels).view(torch.bool)
        bit = torch.arange(8, dtype=torch.uint8, device=self.device)
        return (packed >> bit & 1).flatten(1)[:, :width].bool()

    def unpack(self, numbers: Sequence[int]) -> Tensor:
        """Return some masks of one size, at least one: bool [len(numbers), H, W].

        Raises:
            ValueError: none, or of different sizes.
        """
        sizes = {self.sizes[number] for number in numbers}
        if len(sizes) != 1:
            raise ValueError(f"unpack needs masks of one size, got masks {list(numbers)} of sizes {sorted(sizes)}")
        return torch.stack([self[number] for number in numbers])

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def num_bytes(self) -> int:
        """Memory of the two tensors."""
        return self.bits.numel() + self.table.numel() * self.table.element_size()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedMasks:
        """Return the same masks on another device."""
        bits, table = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.bits, self.table))
        return PackedMasks(bits, table, self.sizes)

    def pin_memory(self) -> PackedMasks:
        """Return the same masks in page-locked memory; `torch.utils.data.DataLoader(pin_memory=True)` calls this."""
        return PackedMasks(self.bits.pin_memory(), self.table.pin_memory(), self.sizes)

    @cached_property
    def _first_bytes(self) -> list[int]:
        return _first_bytes(self.sizes)


def bytes_of_row(width: int) -> int:
    return (width + 7) // 8


def _first_bytes(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return K + 1 byte offsets: of each mask, and the end."""
    return [0, *accumulate(height * bytes_of_row(width) for height, width in sizes)]


def _table(sizes: Sequence[tuple[int, int]]) -> Tensor:
    rows = [(first, bytes_of_row(w), h, w) for first, (h, w) in zip(_first_bytes(sizes), sizes, strict=False)]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, FIELDS)


def _pack(mask: Tensor) -> Tensor:
    """Return uint8 [H, bytes] of uint8 or bool [H, W]."""
    if mask.device.type != "cpu":
        return _pack_on_device(mask)
    import numpy  # which torch can do without

    return torch.from_numpy(numpy.packbits(mask.numpy(), axis=1, bitorder="little"))


def _pack_on_device(mask: Tensor) -> Tensor:
    height, width = mask.shape
    pixels = mask.new_zeros(height, bytes_of_row(width) * 8, dtype=torch.uint8)
    pixels[:, :width] = mask != 0
    weight = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (pixels.view(height, -1, 8) * weight).sum(-1, dtype=torch.uint8)


def _check_mask(number: int, mask: Tensor, first: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.uint8, torch.bool):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"masks[{number}] must be a uint8 or bool tensor [Hm, Wm], got {kind}")
    if mask.dim() != 2 or mask.numel() == 0:
        raise ValueError(f"masks[{number}] must be [Hm, Wm] with pixels, got {list(mask.shape)}")
    if mask.device != first.device:
        raise ValueError(f"masks[{number}] is on {mask.device}, masks[0] on {first.device}: use .to(device)")
