"""Grounding metrics against a loop over pairs and against cases that can be counted by hand."""

import math

import pytest
import torch

from swim_fast.loss.mask_loss import GridPredictions, MaskTargets, mask_alignment_loss
from swim_fast.loss.metrics import METRICS, average_metrics, sum_metrics
from swim_fast.loss.targets import average_mask


def grounding_sums(maps, targets, **options):
    return sum_metrics(GridPredictions.from_maps(maps, targets, **options))


def one_frame(mask, height, width, row=0):
    return MaskTargets(*torch.tensor([[row], [0], [height], [width], [0]]), masks=[mask])


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 4, 90, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    sizes = [(19, 23), (8, 6), (3, 2), (19, 23)]
    masks = [torch.rand(size, generator=generator) < 0.3 for size in sizes]
    masks.append(torch.zeros(19, 23, dtype=torch.bool))
    pairs = [(0, 0, 4, 5, 0), (1, 20, 4, 5, 3), (0, 60, 3, 7, 1), (2, 7, 4, 5, 2), (3, 11, 4, 5, 0), (3, 31, 4, 5, 4)]
    return list(maps), MaskTargets(*torch.tensor(pairs).T.contiguous(), masks=masks)


def judge(maps, targets, fusion):
    """[4], one pair after the other."""
    sums = torch.zeros(4, dtype=torch.float64)
    for i in range(len(targets)):
        row, start, h, w = (int(values[i]) for values in (targets.row, targets.start, targets.height, targets.width))
        mask = targets.masks[int(targets.mask[i])]
        if not mask.any():
            continue
        frame = torch.stack([layer[row, start : start + h * w] for layer in maps])
        f = (frame.prod(0) if fusion == "product" else frame.mean(0)).view(h, w)
        y, x = divmod(int(f.argmax()), w)
        hit = mask[math.floor((y + 0.5) * mask.shape[0] / h), math.floor((x + 0.5) * mask.shape[1] / w)]
        m = average_mask(mask, (h, w), torch.float64)
        p = (f - f.min()) / (f.max() - f.min())
        iou = (p * m).sum() / (p + m - p * m).sum()
        sums += torch.stack([hit.double(), (f * m).sum() / f.sum(), iou, torch.ones_like(iou)])
    return sums


@pytest.mark.parametrize("fusion", ("product", "mean"))
def test_sums_agree_with_the_judge(fusion):
    hits = 0
    for seed in range(10):
        maps, targets = random_case(seed)
        expected = judge(maps, targets, fusion)
        torch.testing.assert_close(grounding_sums(maps, targets, fusion=fusion), expected, rtol=1e-12, atol=0)
        single = grounding_sums([layer.float() for layer in maps], targets, fusion=fusion)
        assert single.dtype == torch.float64
        torch.testing.assert_close(single, expected, rtol=1e-5, atol=0)
        assert expected[3] == 5  # of six: one mask is empty
        hits += int(expected[0])
    assert 5 < hits < 45  # the case has both


def test_none_is_every_layer_by_itself():
    maps, targets = random_case(1)
    sums = grounding_sums(maps, targets, fusion="none")
    assert sums.shape == (3, 4)
    for layer, row in zip(maps, sums, strict=True):
        torch.testing.assert_close(row, grounding_sums([layer], targets))


def test_soft_iou_is_one_minus_the_loss():
    maps, targets = random_case(2)
    whole = torch.arange(len(targets)) != 5  # less the empty mask
    fields = (targets.row, targets.start, targets.height, targets.width, targets.mask)
    targets = MaskTargets(*(field[whole] for field in fields), masks=targets.masks)
    means = average_metrics(grounding_sums(maps, targets))
    loss = mask_alignment_loss(maps, targets, criterion="iou", prediction="min_max", resolution="grid")
    assert means["soft_iou"] == pytest.approx(1 - loss.item())


def test_counted_by_hand():
    """2 x 2 cells over a 5 x 5 mask: cell centres lie at pixels 1 and 3; pixel row and column 2 are divided."""
    mask = torch.zeros(5, 5, dtype=torch.uint8)
    mask[1, 3] = 1
    maps = [torch.tensor([[0.1, 0.4, 0.2, 0.1, 0.2]])]
    hit, mass, iou, pairs = grounding_sums(maps, one_frame(mask, 2, 2)).tolist()
    assert (hit, pairs) == (1, 1)
    assert mass == pytest.approx(0.5 * 1 / 6.25)
    share, p = 1 / 6.25, (0.0, 1.0, 1 / 3, 0.0)
    assert iou == pytest.approx(share / (sum(p) + share - share))
    mask[1, 3], mask[0, 3], mask[1, 2], mask[1, 4] = 0, 1, 1, 1  # all around the centre of the cell, but not on it
    assert grounding_sums(maps, one_frame(mask, 2, 2))[0] == 0


def test_perfect_and_opposite_attention():
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[2:4, 3:9] = True
    inside = average_mask(mask, (4, 4)).flatten()
    on, off = ([layer[None] / layer.sum()] for layer in (inside, 1 - inside))
    assert grounding_sums(on, one_frame(mask, 4, 4)).tolist() == pytest.approx([1, 1, 1, 1])
    assert grounding_sums(off, one_frame(mask, 4, 4)).tolist() == pytest.approx([0, 0, 0, 1], abs=1e-6)


def test_ties_share_the_hit():
    """A constant map points at random; it has no prediction, so no overlap."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, :1] = True
    sums = grounding_sums([torch.full((1, 16), 1 / 16)], one_frame(mask, 4, 4))
    assert sums.tolist() == pytest.approx([0.25, 0.25, 0, 1])
    two = torch.full((1, 16), 0.01)
    two[0, [0, 15]] = 0.4
    assert grounding_sums([two], one_frame(mask, 4, 4))[0] == 0.5


def test_zero_attention_is_no_error():
    maps = [torch.zeros(1, 16), torch.rand(1, 16)]
    mask = torch.ones(4, 4, dtype=torch.bool)
    assert grounding_sums(maps, one_frame(mask, 4, 4))[:2].tolist() == pytest.approx([1, 1])
    assert grounding_sums([maps[0]], one_frame(mask, 4, 4)).tolist() == pytest.approx([1, 1, 0, 1])


@pytest.mark.parametrize("fusion, shape", [("product", (4,)), ("mean", (4,)), ("none", (2, 4))])
def test_no_pair_and_only_empty_masks(fusion, shape):
    maps = [torch.rand(2, 16, requires_grad=True) for _ in range(2)]
    nothing = torch.zeros(0, dtype=torch.long)
    for targets in (
        MaskTargets(nothing, nothing, nothing, nothing, nothing, masks=[]),
        one_frame(torch.zeros(3, 3, dtype=torch.bool), 4, 4),
    ):
        sums = grounding_sums(maps, targets, fusion=fusion)
        assert sums.shape == shape and not sums.any() and not sums.requires_grad


def test_means():
    means = average_metrics(torch.tensor([3.0, 2.0, 1.0, 4.0]))
    assert means == {"pointing_accuracy": 0.75, "mass_in_mask": 0.5, "soft_iou": 0.25} and tuple(means) == METRICS
    assert all(math.isnan(value) for value in average_metrics(torch.zeros(4)).values())


def test_sums_add_up_over_batches():
    cases = [random_case(seed) for seed in (3, 4)]
    apart = sum(grounding_sums(*case) for case in cases)
    maps = [torch.cat(layers) for layers in zip(*(maps for maps, _ in cases), strict=True)]
    (first, second) = (targets for _, targets in cases)
    shift = {"row": 4, "mask": len(first.masks)}
    names = ("row", "start", "height", "width", "mask")
    joined = {n: torch.cat([getattr(first, n), getattr(second, n) + shift.get(n, 0)]) for n in names}
    together = grounding_sums(maps, MaskTargets(**joined, masks=[*first.masks, *second.masks]))
    torch.testing.assert_close(together, apart)


def test_nothing_is_read_back_from_the_device():
    maps, targets = random_case(5)
    assert grounding_sums([layer.to("meta") for layer in maps], targets.to("meta")).shape == (4,)


def test_errors_are_those_of_the_loss():
    maps, targets = random_case(6)
    with pytest.raises(ValueError, match="fusion='max' is unknown"):
        grounding_sums(maps, targets, fusion="max")
    with pytest.raises(ValueError, match="no attention map"):
        grounding_sums([], targets)
