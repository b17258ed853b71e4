"""Ranking metrics against values computed by hand and by plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from swim_fast.loss.mask_loss import GridPredictions, MaskTargets
from swim_fast.loss.metrics import average_metrics
from swim_fast.loss.ranking_metrics import (
    PERCENTS,
    POINTS,
    RANKING_METRICS,
    compute_ranking_metrics,
    sum_ranking_metrics,
)


def metrics(grid_map, mask) -> dict[str, float]:
    values = compute_ranking_metrics(torch.as_tensor(grid_map), torch.as_tensor(mask))
    return dict(zip(RANKING_METRICS, values.tolist(), strict=True))


def test_by_hand():
    # no interpolation: the mask has the grid's size. Ranked: 4 (in), 3 (out), 2 (in), 1 (out)
    found = metrics([[4.0, 3.0], [1.0, 2.0]], [[1, 0], [0, 1]])
    assert found["gamepoint_top_1"] == 1 and found["gamepoint_top_1pct"] == 1  # one pixel
    assert found["gamepoint_top_10"] == found["gamepoint_top_100"] == 0.5  # there are four
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["auc"] == pytest.approx(3 / 4)  # 4 beats 3 and 1, 2 beats 1
    assert found["nss"] == pytest.approx((3 - 2.5) / math.sqrt(1.25))
    assert found["precision_at_75"] == 1  # from 1 + 0.75 · 3 = 3.25 on


def test_a_constant_map_is_random_pointing():
    mask = torch.zeros(6, 10)
    mask[1:3, 2:5] = 1
    found = metrics(torch.full((2, 3), 0.1), mask)
    share = mask.mean().item()
    assert found.pop("auc") == pytest.approx(0.5) and found.pop("nss") == 0
    assert all(value == pytest.approx(share) for value in found.values())


def test_a_map_that_is_the_mask():
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[2:5, 3:7] = 1
    found = metrics(mask.double(), mask)
    assert found["average_precision"] == found["auc"] == found["precision_at_75"] == 1
    assert metrics(1 - mask.double(), mask)["auc"] == 0


@pytest.mark.parametrize("mask", [torch.zeros(4, 4), torch.ones(4, 4)])
def test_nothing_to_rank(mask):
    assert compute_ranking_metrics(torch.rand(2, 2), mask) is None


@pytest.mark.parametrize("grid, size", [((3, 5), (7, 11)), ((4, 4), (9, 30)), ((1, 6), (5, 5))])
@pytest.mark.parametrize("levels", [None, 3])
def test_against_loops(grid, size, levels):
    """Against definitions written pixel by pixel; with few levels many pixels tie."""
    torch.manual_seed(sum(grid) + sum(size))
    grid_map = torch.rand(grid, dtype=torch.float64)
    if levels:
        grid_map, size = (grid_map * levels).floor(), grid
    mask = torch.rand(size) < 0.3
    mask[0, 0], mask[-1, -1] = True, False
    scores = F.interpolate(grid_map[None, None], size=size, mode="bilinear", align_corners=False)
    scores = scores.flatten().round(decimals=9).tolist()  # pixels that are equal but for rounding tie
    inside = mask.flatten().tolist()
    found = metrics(grid_map, mask)

    def share_of_top(count: int) -> float:
        higher = sorted(scores, reverse=True)[count - 1]
        sure = [i for s, i in zip(scores, inside, strict=True) if s > higher]
        tied = [i for s, i in zip(scores, inside, strict=True) if s == higher]
        return (sum(sure) + (count - len(sure)) * sum(tied) / len(tied)) / count

    for percent in PERCENTS:
        count = math.ceil(len(scores) * percent / 100)
        assert found[f"gamepoint_top_{percent}pct"] == pytest.approx(share_of_top(count))
    for points in POINTS:
        assert found[f"gamepoint_top_{points}"] == pytest.approx(share_of_top(min(points, len(scores))))
    positive = [s for s, i in zip(scores, inside, strict=True) if i]
    negative = [s for s, i in zip(scores, inside, strict=True) if not i]
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    assert found["auc"] == pytest.approx(wins / (len(positive) * len(negative)))
    precision, recall = 0.0, 0.0
    for level in sorted(set(scores), reverse=True):
        chosen = [i for s, i in zip(scores, inside, strict=True) if s >= level]
        now = sum(chosen) / len(positive)
        precision += (now - recall) * sum(chosen) / len(chosen)
        recall = now
    assert found["average_precision"] == pytest.approx(precision)


def test_scale_does_not_matter():
    torch.manual_seed(0)
    grid_map, mask = torch.rand(4, 6, dtype=torch.float64), torch.rand(20, 30) < 0.2
    assert metrics(grid_map, mask) == pytest.approx(metrics(8.0 * grid_map - 2.0, mask))


def test_a_map_that_is_not_finite():
    found = metrics([[1.0, math.nan], [0.0, 0.0]], [[1, 0], [0, 0]])
    assert all(math.isnan(value) for value in found.values())


def batch(masks, seed=0, grid=(2, 3), layers=2):
    """Two rows over two patches each, and one pair per mask: row by row, patch by patch."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.rand(2, 12, generator=generator, dtype=torch.float64) + 0.1 for _ in range(layers)]
    pairs = [(i // 2, 6 * (i % 2), *grid, i) for i in range(len(masks))]
    return maps, MaskTargets(*torch.tensor(pairs).T.contiguous(), masks=masks)


MASKS = [torch.eye(4, 6), torch.zeros(4, 6), torch.ones(5, 7), torch.eye(5, 7)]  # the second and third count nowhere
MASKS = [mask.bool() for mask in MASKS]


@pytest.mark.parametrize("fusion", ["mean", "product", "none"])
def test_sums_over_the_pairs(fusion):
    maps, targets = batch(MASKS)
    sums = sum_ranking_metrics(GridPredictions.from_maps(maps, targets, fusion=fusion))
    assert sums.dtype == torch.float64 and sums[..., -1].flatten().unique().tolist() == [2]
    stacked = torch.stack(maps)
    fused = {"mean": stacked.mean(0)[None], "product": stacked.prod(0)[None], "none": stacked}[fusion]
    for layer, found in zip(fused, sums.reshape(len(fused), -1), strict=True):
        pairs = [(layer[0, :6], MASKS[0]), (layer[1, 6:], MASKS[3])]
        expected = sum(compute_ranking_metrics(grid_map.view(2, 3), mask) for grid_map, mask in pairs)
        torch.testing.assert_close(found[:-1], expected)
        means = average_metrics(found, RANKING_METRICS)
        assert tuple(means) == tuple(RANKING_METRICS) and means["auc"] == pytest.approx(found[7].item() / 2)


def test_sums_add_up_over_batches():
    maps, targets = batch(MASKS)
    whole = sum_ranking_metrics(GridPredictions.from_maps(maps, targets))
    fields = (targets.row, targets.start, targets.height, targets.width, targets.mask)
    halves = [MaskTargets(*(field[part] for field in fields), masks=MASKS) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(
        sum(sum_ranking_metrics(GridPredictions.from_maps(maps, half)) for half in halves), whole
    )


def test_no_pair_that_counts():
    maps, targets = batch(MASKS[1:3])
    maps = [layer.requires_grad_() for layer in maps]
    sums = sum_ranking_metrics(GridPredictions.from_maps(maps, targets))
    assert sums.shape == (11,) and not sums.any() and not sums.requires_grad
    assert all(math.isnan(value) for value in average_metrics(sums, RANKING_METRICS).values())
    nothing = torch.zeros(0, dtype=torch.long)
    empty = MaskTargets(nothing, nothing, nothing, nothing, nothing, masks=[])
    assert sum_ranking_metrics(GridPredictions.from_maps(maps, empty, fusion="none")).shape == (2, 11)
