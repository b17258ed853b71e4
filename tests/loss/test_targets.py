"""What every cell should look like, read from the masks once, and how it travels."""

import math
import pickle

import pytest
import torch

from swim_fast.loss import targets as module
from swim_fast.loss.targets import MaskTargets, average_mask
from swim_kernels import PackedMasks

SIZES = [(19, 23), (8, 6), (3, 2), (19, 23)]
# row, start, height, width, mask; grids and mask sizes in turn, one finer than its mask
PAIRS = [(0, 0, 4, 5, 0), (1, 20, 4, 5, 3), (0, 60, 3, 7, 1), (2, 7, 4, 5, 2), (3, 11, 4, 5, 0), (3, 31, 4, 5, 4)]


@pytest.fixture
def targets():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(size, generator=generator) < 0.3 for size in SIZES]
    masks.append(torch.zeros(19, 23, dtype=torch.bool))
    return MaskTargets(*torch.tensor(PAIRS).T.contiguous(), masks=masks)


@pytest.mark.parametrize("packed", [False, True])
def test_cell_targets_in_the_order_of_the_pairs(targets, packed, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_PIXELS_CPU", 500)  # two masks, or one, at a time
    masks = PackedMasks.pack(targets.masks) if packed else targets.masks
    targets = MaskTargets(*torch.tensor(PAIRS).T.contiguous(), masks=masks)
    shares, exact, centres = [], [], []
    for _, _, height, width, mask in PAIRS:
        mask = targets.masks[mask]
        shares.append(average_mask(mask, (height, width)).flatten())
        exact.append(average_mask(mask, (height, width), torch.float64).flatten())
        for y in range(height):
            for x in range(width):
                pixel = math.floor((y + 0.5) * mask.shape[0] / height), math.floor((x + 0.5) * mask.shape[1] / width)
                centres.append(float(mask[pixel]))
    assert torch.equal(targets.cell_targets, torch.stack([torch.cat(shares), torch.tensor(centres)]))
    assert torch.equal(targets.cell_shares(torch.float64), torch.cat(exact))
    assert torch.equal(targets.cell_shares(), torch.cat(shares)) and targets.cell_targets.dtype == torch.float32


def test_prepared_targets_carry_their_cells_and_groups(targets, monkeypatch):
    expected = targets.prepare().cell_targets
    groups = targets.groups
    monkeypatch.setattr(PackedMasks, "unpack", None)  # no mask is read again
    for moved in (
        targets.to("cpu"),
        pickle.loads(pickle.dumps(targets)),
        pickle.loads(pickle.dumps(targets)).to("cpu"),
    ):
        assert torch.equal(moved.cell_targets, expected)
        for group, original in zip(moved.groups, groups, strict=True):
            assert torch.equal(group.pairs, original.pairs) and torch.equal(group.mask, original.mask)
        for name in ("row", "start", "height", "width", "mask"):
            assert torch.equal(getattr(moved, name), getattr(targets, name))
    assert targets.to("meta").cell_targets.shape == expected.shape


def test_no_pair():
    nothing = torch.zeros(0, dtype=torch.long)
    targets = MaskTargets(nothing, nothing, nothing, nothing, nothing, masks=[]).prepare()
    for moved in (targets, targets.to("cpu"), targets.to("meta")):
        assert len(moved) == 0 and moved.groups == () and moved.cell_targets.shape == (2, 0)
