"""PackedMasks: the bits, the sequence, what it refuses, and its ways to workers and devices."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from swim_kernels.structs import packed_masks
from swim_kernels.structs.packed_masks import PackedMasks

SIZES = [(3, 8), (5, 17), (1, 1), (2, 7), (4, 9), (5, 17)]


def random_masks(sizes=SIZES, dtype=torch.bool):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(*size, generator=generator) < 0.4).to(dtype) for size in sizes]


def test_layout():
    """By hand: little-endian bits, rows of whole bytes, one mask after the other."""
    first = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.uint8)
    masks = PackedMasks.pack([first, torch.tensor([[True, True, False]])])
    assert masks.bits.tolist() == [0b101, 1, 0b10000000, 0, 0b11]
    assert masks.table.tolist() == [[0, 2, 2, 9], [4, 1, 1, 3]]
    assert masks.sizes == ((2, 9), (1, 3))
    assert masks.num_bytes == 5 + 2 * 4 * 8


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
def test_round_trip(dtype):
    masks = random_masks(dtype=dtype)
    packed = PackedMasks.pack(masks)
    assert isinstance(packed, Sequence) and len(packed) == len(masks)
    assert packed.table.dtype == torch.int64 and packed.bits.dtype == torch.uint8
    for unpacked, mask in zip(packed, masks, strict=True):
        assert unpacked.dtype == torch.bool and torch.equal(unpacked, mask != 0)
    expected = [np.packbits(mask.numpy() != 0, axis=1, bitorder="little").ravel() for mask in masks]
    assert np.array_equal(packed.bits.numpy(), np.concatenate(expected))


def test_non_zero_is_set():
    assert PackedMasks.pack([torch.tensor([[0, 1, 2, 128, 255]], dtype=torch.uint8)])[0].tolist() == [
        [False, True, True, True, True]
    ]


def test_strided_masks():
    mask = random_masks([(20, 33)])[0]
    for view in (mask.t(), mask[::3, 1::2], mask[:1].expand(4, -1)):
        assert torch.equal(PackedMasks.pack([view])[0], view)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
def test_devices_pack_the_same_bits(dtype):
    for mask in random_masks(dtype=dtype):
        for view in (mask, mask.t(), mask.t() * 200 if dtype == torch.uint8 else ~mask):
            assert torch.equal(packed_masks._pack_on_device(view), packed_masks._pack(view))


def test_pack_on_a_device_reads_nothing_back():
    packed = PackedMasks.pack([mask.to("meta") for mask in random_masks()])
    assert packed.device.type == packed.table.device.type == "meta" and packed[1].shape == (5, 17)
    assert packed.sizes == tuple(SIZES)


def test_items():
    masks = random_masks()
    packed = PackedMasks.pack(masks)
    assert torch.equal(packed[-2], masks[4])
    for part in (slice(1, 4), slice(None, None, -2), slice(9, 12)):
        chosen = packed[part]
        assert isinstance(chosen, list) and len(chosen) == len(masks[part])
        assert all(torch.equal(a, b) for a, b in zip(chosen, masks[part], strict=True))
    for number in (6, -7):
        with pytest.raises(IndexError, match=f"mask {number} of 6"):
            packed[number]
    assert torch.equal(packed.rows(1, 2, 4), masks[1][2:4])


def test_unpack():
    masks = random_masks()
    packed = PackedMasks.pack(masks)
    assert torch.equal(packed.unpack([5, 1, 5]), torch.stack([masks[5], masks[1], masks[5]]))
    with pytest.raises(ValueError, match=r"masks of one size, got masks \[0, 1\] of sizes \[\(3, 8\), \(5, 17\)\]"):
        packed.unpack([0, 1])
    with pytest.raises(ValueError, match="masks of one size, got masks"):
        packed.unpack([])


def test_no_mask():
    packed = PackedMasks.pack([])
    assert len(packed) == packed.num_bytes == 0 and list(packed) == [] and packed.table.shape == (0, 4)
    assert len(packed.to("meta")) == 0


@pytest.mark.parametrize(
    "masks, error, message",
    [
        ([torch.zeros(2, 2)], TypeError, r"masks\[0\] must be a uint8 or bool tensor \[Hm, Wm\], got torch.float32"),
        ([*random_masks()[:2], [[1]]], TypeError, r"masks\[2\] must be a uint8 or bool tensor \[Hm, Wm\], got list"),
        (
            [*random_masks()[:1], torch.ones(3).bool()],
            ValueError,
            r"masks\[1\] must be \[Hm, Wm\] with pixels, got \[3\]",
        ),
        ([torch.ones(0, 3).bool()], ValueError, r"masks\[0\] must be \[Hm, Wm\] with pixels, got \[0, 3\]"),
        (
            [*random_masks()[:1], torch.ones(2, 3, device="meta").bool()],
            ValueError,
            r"masks\[1\] is on meta, masks\[0\] on cpu: use .to\(device\)",
        ),
    ],
)
def test_what_pack_refuses(masks, error, message):
    with pytest.raises(error, match=message):
        PackedMasks.pack(masks)


def test_what_the_constructor_refuses():
    packed = PackedMasks.pack(random_masks())
    with pytest.raises(TypeError, match="bits must be uint8 and table int64, got torch.uint8 and torch.int32"):
        PackedMasks(packed.bits, packed.table.int(), packed.sizes)
    with pytest.raises(ValueError, match=r"6 masks take bits \[44\] and table \[6, 4\], got \[43\] and \[6, 4\]"):
        PackedMasks(packed.bits[1:], packed.table, packed.sizes)
    with pytest.raises(ValueError, match="got .* and .*5, 4"):
        PackedMasks(packed.bits, packed.table[1:], packed.sizes)
    with pytest.raises(ValueError, match="bits are on cpu, table on meta"):
        PackedMasks(packed.bits, packed.table.to("meta"), packed.sizes)


def test_to():
    packed = PackedMasks.pack(random_masks())
    moved = packed.to("meta", non_blocking=True)
    assert moved.device.type == "meta" and moved.sizes == packed.sizes and moved[0].shape == (3, 8)


def test_between_processes():
    masks = random_masks()
    starts = torch.arange(2)
    loader = torch.utils.data.DataLoader(
        starts, batch_size=1, num_workers=1, collate_fn=lambda start: PackedMasks.pack(masks[start[0] :])
    )
    for index, packed in enumerate([*loader, pickle.loads(pickle.dumps(PackedMasks.pack(masks[2:])))]):
        assert isinstance(packed, PackedMasks) and len(packed) == len(masks) - index
        assert all(torch.equal(a, b) for a, b in zip(packed, masks[index:], strict=True))


def test_pin_memory_pins_both_tensors(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.dtype) or self.clone())
    packed = PackedMasks.pack(random_masks())
    assert packed.pin_memory().sizes == packed.sizes
    assert pinned == [torch.uint8, torch.int64]
