"""Arguments of the mask loss: targets, their checks and moves, and the choices it refuses."""

import pickle

import pytest
import torch

from swim_fast.loss.mask_loss import (
    MaskTargets,
    mask_alignment_loss,
)
from swim_kernels import PackedMasks
from tests.loss.mask_loss_cases import CHOICES, random_maps, random_targets, vars_of


def fields(**changes):
    values = {"row": [0, 1], "start": [0, 6], "height": [2, 2], "width": [3, 3], "mask": [0, 0]}
    values = {name: torch.tensor(value) for name, value in values.items()} | {"masks": [torch.ones(4, 5).bool()]}
    return values | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"start": [0, 6]}, TypeError, r"MaskTargets\.start must be an int64 or int32 tensor \[P\], got list"),
        ({"mask": torch.zeros(2)}, TypeError, r"MaskTargets\.mask must be .* got torch\.float32"),
        ({"width": torch.tensor([3])}, ValueError, r"MaskTargets\.width has shape \[1\], row has \[2\]"),
        ({"row": torch.tensor([[0, 1]])}, ValueError, r"MaskTargets\.row has shape \[1, 2\]"),
        ({"height": torch.ones(2, dtype=torch.long, device="meta")}, ValueError, r"height is on meta, row on cpu"),
        ({"masks": [torch.ones(4, 5)]}, TypeError, r"masks\[0\] must be a uint8 or bool tensor .* got torch\.float32"),
        ({"masks": [[1]]}, TypeError, r"masks\[0\] must be a uint8 or bool tensor .* got list"),
        ({"masks": [torch.ones(1, 4, 5).bool()]}, ValueError, r"masks\[0\] must be \[Hm, Wm\] with pixels, got \[1, 4"),
        ({"masks": [torch.ones(0, 5).bool()]}, ValueError, r"masks\[0\] must be \[Hm, Wm\] with pixels, got \[0, 5\]"),
        ({"masks": [torch.ones(4, 5, device="meta").bool()]}, ValueError, r"masks\[0\] is on meta, row on cpu"),
        ({"masks": PackedMasks.pack([torch.ones(4, 5).bool()]).to("meta")}, ValueError, "masks are on meta"),
    ],
)
def test_targets_refuse_what_does_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        MaskTargets(**fields(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"row": [0, 4]}, r"pair 1 has row = 4, must be in \[0, 4\)"),
        ({"row": [-1, 0]}, r"pair 0 has row = -1, must be in \[0, 4\)"),
        ({"start": [-2, 0]}, r"pair 0 has start = -2, must be at least 0"),
        ({"start": [0, 7]}, r"pair 1 has start \+ height \* width = 13, must be in \[1, 13\)"),
        ({"height": [2, 0]}, r"pair 1 has height = 0, must be at least 1"),
        ({"width": [-3, 3]}, r"pair 0 has width = -3, must be at least 1"),
        ({"mask": [0, 1]}, r"pair 1 has mask = 1, must be in \[0, 1\)"),
    ],
)
def test_check_names_pair_and_limit(changes, message):
    targets = MaskTargets(**fields(**{name: torch.tensor(value) for name, value in changes.items()}))
    with pytest.raises(ValueError, match=message):
        targets.check(rows=4, columns=12)


def test_check_returns_good_targets():
    targets = MaskTargets(**fields())
    assert targets.check(rows=2, columns=12) is targets.check() is targets
    with pytest.raises(ValueError, match="row = 1, must be in"):
        targets.check(rows=1)
    nothing = torch.zeros(0, dtype=torch.long)
    MaskTargets(nothing, nothing, nothing, nothing, nothing, masks=[]).check(rows=0, columns=0)


def test_grouping_refuses_bad_values():
    maps = [torch.rand(2, 12)]
    with pytest.raises(ValueError, match="pair 1 has a grid of 0 x 3; both must be at least 1"):
        mask_alignment_loss(maps, MaskTargets(**fields(height=torch.tensor([2, 0]))))
    for number in (1, -1):
        with pytest.raises(ValueError, match=f"pair 0 asks for mask {number} of 1"):
            mask_alignment_loss(maps, MaskTargets(**fields(mask=torch.tensor([number, 0]))))


def test_outside_of_the_maps_is_an_error():
    with pytest.raises(IndexError):
        mask_alignment_loss([torch.rand(2, 11)], MaskTargets(**fields()))
    with pytest.raises(IndexError):
        mask_alignment_loss([torch.rand(1, 12)], MaskTargets(**fields()))


def test_targets_travel(generator):
    targets = random_targets(generator)
    assert len(targets) == 7 and targets.device.type == "cpu"
    meta = targets.to("meta", non_blocking=True)
    assert len(meta) == 7 and {t.device.type for t in (meta.row, meta.mask, *meta.masks)} == {"meta"}
    assert (
        [group.grid for group in meta.groups]
        == [group.grid for group in targets.groups]
        == [(4, 5), (6, 7), (6, 7), (7, 3)]
    )
    assert all(group.pairs.device.type == "meta" for group in meta.groups)
    maps = random_maps(generator)
    loss = mask_alignment_loss(maps, targets)
    for copy in (pickle.loads(pickle.dumps(targets)), targets.to("cpu"), MaskTargets(**vars_of(targets, torch.int32))):
        assert torch.equal(mask_alignment_loss(maps, copy), loss)
    with pytest.raises(AttributeError):
        targets.row = targets.start


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pinned_targets_reach_the_gpu_without_a_synchronisation(generator):
    targets, maps = random_targets(generator).pin_memory(), random_maps(generator)
    assert targets.row.is_pinned() and targets.masks.bits.is_pinned() and targets.groups[0].pairs.is_pinned()
    maps = [layer.float().cuda().requires_grad_() for layer in maps]
    try:
        torch.cuda.set_sync_debug_mode("error")
        moved = targets.to("cuda", non_blocking=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses = [mask_alignment_loss(maps, moved, **choice) for choice in CHOICES]
        torch.stack(losses).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for loss, choice in zip(losses, CHOICES, strict=True):
        torch.testing.assert_close(
            loss.cpu(), mask_alignment_loss([m.detach().cpu() for m in maps], targets, **choice), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"fusion": "sum"}, ValueError, r"fusion='sum' is unknown; choose one of mean, add, product, none"),
        (
            {"criterion": "mse"},
            ValueError,
            r"criterion='mse' is unknown; choose one of bce, focal, iou, dice, kl, mass, klal",
        ),
        ({"prediction": "fast"}, ValueError, r"prediction='fast' is unknown; choose one of probability, min_max, rel"),
        ({"resolution": "full"}, ValueError, r"resolution='full' is unknown; choose one of mask, grid"),
        ({"maps": []}, ValueError, r"no attention map"),
        ({"maps": [torch.rand(2, 12), None]}, TypeError, r"maps\[1\] must be a floating-point tensor .* got NoneType"),
        ({"maps": [torch.ones(2, 12).long()]}, TypeError, r"maps\[0\] must be a floating-point .* got torch\.int64"),
        ({"maps": torch.rand(2, 12)}, ValueError, r"maps\[0\] has shape \[12\]"),
        (
            {"maps": [torch.rand(2, 12), torch.rand(2, 13)]},
            ValueError,
            r"maps\[1\] has shape \[2, 13\], maps\[0\] \[2,",
        ),
        ({"maps": [torch.rand(2, 12, device="meta")]}, ValueError, r"maps\[0\] is on meta, the targets are on cpu"),
        ({"targets": None}, TypeError, r"targets must be MaskTargets, got NoneType"),
    ],
)
def test_the_loss_refuses_what_does_not_fit(changes, error, message):
    arguments = {"maps": [torch.rand(2, 12)], "targets": MaskTargets(**fields())} | changes
    with pytest.raises(error, match=message):
        mask_alignment_loss(arguments.pop("maps"), arguments.pop("targets"), **arguments)
