"""The KL attention loss (arXiv 2511.12738) against its formula in float64."""

import pytest
import torch

from swim_fast import MaskTargets, mask_alignment_loss
from swim_fast.errors import OptionError
from swim_fast.options import AttentionLoss
from tests.loss.mask_loss_cases import judge_average_mask

GRIDS = [(0, 0, 3, 4), (0, 24, 3, 4), (1, 12, 3, 4), (2, 30, 2, 3)]  # row, first column, h, w


def make(dtype=torch.float64, empty=False):
    """Two layers of maps [3, 36] that sum to one in each row, and pairs of which row 0 has two patches."""
    generator = torch.Generator().manual_seed(0)
    maps = list((2 * torch.randn(2, 3, 36, generator=generator, dtype=torch.float64)).softmax(-1).to(dtype))
    masks = [torch.rand(9, 11, generator=generator) < 0.4 for _ in GRIDS]
    if empty:
        masks[2] = torch.zeros(9, 11)
    row, start, height, width = (torch.tensor(column) for column in zip(*GRIDS, strict=True))
    targets = MaskTargets(row, start, height, width, torch.arange(len(GRIDS)), [mask.to(torch.uint8) for mask in masks])
    return [m.requires_grad_() for m in maps], targets


def divergences(maps, targets, fusion):
    """KL(P ‖ Q) of each row, as written in the paper: P over all its visual tokens, layers averaged."""
    layers = [sum(maps) / len(maps)] if fusion == "mean" else maps
    found = []
    for row in targets.row.unique().tolist():
        wanted = torch.zeros(36, dtype=torch.float64)
        for pair, (of, start, h, w) in enumerate(GRIDS):
            if of == row:
                wanted[start : start + h * w] += judge_average_mask(targets.masks[pair], h, w, torch.float64).flatten()
        some = wanted > 0
        wanted = wanted / wanted.sum().clamp_min(1e-300)
        terms = [(wanted[some] * (wanted[some] / layer[row][some]).log()).sum() for layer in layers]
        found.append(sum(terms) / len(terms))
    return found


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("fusion", ["none", "mean"])
def test_value_and_gradient_are_those_of_the_formula(fusion, empty):
    maps, targets = make(empty=empty)
    loss = mask_alignment_loss(maps, targets, criterion="klal", fusion=fusion)
    rows = divergences(maps, targets, fusion)
    wanted = (2 * rows[0] + rows[1] + rows[2]) / 4  # a row counts for each of its patches
    torch.testing.assert_close(loss, wanted)
    assert rows[1].item() == 0 or not empty
    found = torch.autograd.grad(loss, maps)
    for gradient, other in zip(found, torch.autograd.grad(wanted, maps), strict=True):
        torch.testing.assert_close(gradient, other)
        assert gradient.abs().sum() > 0


def test_it_is_least_where_attention_is_the_mask():
    _, targets = make()
    wanted = torch.zeros(3, 36, dtype=torch.float64)
    for pair, (row, start, h, w) in enumerate(GRIDS):
        share = judge_average_mask(targets.masks[pair], h, w, torch.float64)
        wanted[row, start : start + h * w] = share.flatten()
    perfect = wanted / wanted.sum(1, keepdim=True)
    assert mask_alignment_loss([perfect], targets, criterion="klal").item() == pytest.approx(0, abs=1e-12)


def test_single_precision_and_zero_attention():
    maps, targets = make(torch.float32)
    exact = mask_alignment_loss([m.double() for m in maps], targets, criterion="klal")
    assert mask_alignment_loss(maps, targets, criterion="klal").item() == pytest.approx(exact.item(), rel=1e-6)
    nothing = torch.zeros(3, 36, requires_grad=True)
    loss = mask_alignment_loss([nothing], targets, criterion="klal")
    loss.backward()
    assert loss.isfinite() and nothing.grad.isfinite().all()


@pytest.mark.parametrize("choice", [{"fusion": "product"}, {"fusion": "add"}, {"prediction": "min_max"}])
def test_what_is_no_distribution_is_refused(choice):
    with pytest.raises(OptionError, match="klal"):
        mask_alignment_loss(*make(), criterion="klal", **choice)


def test_options_name_what_does_not_go_together():
    assert AttentionLoss(criterion="klal", softmax="visual", fusion="none").criterion == "klal"
    with pytest.raises(ValueError, match="softmax"):
        AttentionLoss(criterion="klal", softmax="causal")
