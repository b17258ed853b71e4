"""Grounding metrics of a micro-batch on a GPU: a few launches, whatever the number of masks, and no wait."""

import pytest
import torch

from swim_fast.loss.mask_loss import GridPredictions, MaskTargets, compute_pair_losses
from swim_fast.loss.metrics import sum_metrics
from swim_kernels import PackedMasks
from tests.helpers.pretend_gpu import record

ROWS, LAYERS, GRIDS = 2, 6, ((26, 46), (20, 36))


def make_targets(num_masks):
    """Every mask of 720p with two rows, grids of two sizes in turn; as the collator makes them."""
    masks = torch.zeros(num_masks, 720, 1280, dtype=torch.uint8)
    masks[:, 100:300, 400:700] = 1
    grids = [GRIDS[mask % len(GRIDS)] for mask in range(num_masks)]
    cells = max(height * width for height, width in GRIDS)
    pairs = [(row, mask * cells, *grid, mask) for mask, grid in enumerate(grids) for row in range(ROWS)]
    columns = torch.tensor(pairs).T.contiguous()
    return MaskTargets(*columns, masks=PackedMasks.pack(list(masks))).prepare(), num_masks * cells


@pytest.mark.parametrize("fusion", ["mean", "none"])
@pytest.mark.parametrize("num_masks", [32, 256])
def test_few_launches_and_no_wait(num_masks, fusion):
    targets, columns = make_targets(num_masks)
    targets = targets.pin_memory()
    with record() as moving:
        targets = targets.to("cuda", non_blocking=True)
    assert moving.count("copy") == 1 and moving.count("launch") == moving.count("wait") == 0
    maps = [torch.rand(ROWS, columns, device="cuda", requires_grad=True) for _ in range(LAYERS)]
    predictions = GridPredictions.from_maps(maps, targets, fusion=fusion)
    sum_metrics(predictions)  # compiles
    with record() as seen:
        sums = sum_metrics(predictions)
    assert sums.shape == ((LAYERS, 4) if fusion == "none" else (4,)) and sums.dtype == torch.float64
    assert 1 <= seen.count("launch") <= 3, seen.describe("launch")
    assert seen.count("copy") + seen.count("fill") + seen.count("wait") == 0, seen.describe("wait")


@pytest.mark.parametrize("criterion", ["kl", "mass", "iou", "dice"])
def test_losses_on_the_grid_read_no_mask(criterion):
    launches = []
    for num_masks in (4, 32):
        targets, columns = make_targets(num_masks)
        targets = targets.pin_memory().to("cuda", non_blocking=True)
        predictions = GridPredictions.from_maps([torch.rand(ROWS, columns, device="cuda")], targets)
        with record() as seen:
            compute_pair_losses(predictions, criterion, "grid")
        assert seen.count("wait") == 0 and not seen.count("launch", "packed_masks.py")
        launches.append(seen.count("launch", "_compare"))
    assert launches[0] == launches[1]
