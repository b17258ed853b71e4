"""The mask loss against a float64 loop over pairs written straight from the formulas, and its numerical promises."""

import math

import pytest
import torch
import torch.nn.functional as F

from swim_fast.loss import released as released_loss
from swim_fast.loss.mask_loss import (
    CRITERIA,
    FUSIONS,
    PREDICTIONS,
    RESOLUTIONS,
    MaskTargets,
    mask_alignment_loss,
)
from tests.loss.mask_loss_cases import (
    each_choice,
    judge,
    one_frame,
    pair_losses,
    predict,
    random_maps,
    random_targets,
    relative_error,
    with_graph,
)

# ---- values and gradients ----


@each_choice
def test_float64_agrees_with_the_judge(choice, generator):
    targets = random_targets(generator)
    ours, judges = (with_graph(maps) for maps in [random_maps(generator)] * 2)
    upstream = torch.randn(len(targets), generator=generator, dtype=torch.float64)
    losses, expected = pair_losses(ours, targets, **choice), judge(judges, targets, **choice)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(mask_alignment_loss(ours, targets, **choice), expected.mean(), rtol=1e-10, atol=0)
    for actual, wanted in zip(
        torch.autograd.grad(losses, ours, upstream), torch.autograd.grad(expected, judges, upstream), strict=True
    ):
        assert relative_error(actual, wanted) < 1e-8


@each_choice
def test_fp32_is_as_accurate_as_the_formulas_in_fp32(choice, generator):
    targets, exact = random_targets(generator), random_maps(generator)
    exact = [layer.float().double() for layer in exact]
    upstream = torch.randn(len(targets), generator=generator)
    results = []
    for function, dtype in ((judge, torch.float64), (judge, torch.float32), (pair_losses, torch.float32)):
        maps = with_graph(exact, dtype)
        losses = function(maps, targets, **choice)
        results.append([losses, *torch.autograd.grad(losses, maps, upstream.to(dtype))])
    assert results[2][0].dtype == torch.float32
    for wanted, eager, actual in zip(*results, strict=True):
        budget = 2 * relative_error(eager, wanted) + 4e-6
        if choice["criterion"] == "bce":
            # p's last digit is 2**-24 where 1 - p, at a patch's maximum, is 1e-6: what a pixel there costs is known
            # to 6 %. In "min_max" this is one pixel in hundreds and without a gradient.
            budget += 2**-24 / 1e-6 if choice["prediction"] == "released" else 1e-3
        assert relative_error(actual, wanted) <= budget


def test_bce_gradient_keeps_its_digits_where_the_prediction_is_0_or_1(generator):
    """The frame's maximum lies outside of the mask, its minimum inside: BCE's slope of 1e6 there has to cancel."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    logits = torch.randn(1, 16, generator=generator).double()
    logits[0, 0], logits[0, 15] = -4.0, 4.0
    targets = one_frame(mask, 4, 4)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        maps = with_graph([logits.softmax(-1)], dtype)
        loss = mask_alignment_loss(maps, targets, prediction="min_max", resolution="grid")
        gradients.append(torch.autograd.grad(loss, maps)[0])
    assert relative_error(gradients[1], gradients[0]) < 2e-6


def test_a_nearly_flat_frame_keeps_its_digits(generator):
    """Six layers of 1/12288 within 1e-4: log a has an absolute rounding error of 1e-6, min-max would magnify it."""
    exact = [(1 / 12288 * (1 + 1e-4 * torch.rand(1, 20, generator=generator).double())).float() for _ in range(6)]
    targets = one_frame(torch.ones(4, 5, dtype=torch.bool), 4, 5)
    how = {"fusion": "product", "prediction": "min_max"}
    p32, p64 = (predict([m.to(t) for m in exact], targets, **how).p.flatten() for t in (torch.float32, torch.float64))
    log_f = sum(layer.log() for layer in exact)[0]
    naive = (log_f - log_f.min()) / (log_f.max() - log_f.min())
    assert (naive - p64).abs().max() > 5e-3
    assert (p32 - p64).abs().max() < 1e-3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_min_max_is_the_limit_of_released(fusion, generator, monkeypatch):
    monkeypatch.setattr(released_loss, "EPSILON", 1e-40)
    maps, targets = random_maps(generator), random_targets(generator)
    limit, released = (predict(maps, targets, fusion=fusion, prediction=name) for name in ("min_max", "released"))
    torch.testing.assert_close(limit.p, released.p, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(limit.log_f, released.log_f, rtol=1e-9, atol=1e-12)


def test_released_bce_ends_at_100(generator):
    """p = 0 exactly over the whole mask: the logarithm is clamped at -100."""
    maps = [torch.tensor([[0.5, 0.0, 0.0, 0.5]])]
    mask = torch.tensor([[False, True, True, False]])
    loss = mask_alignment_loss(maps, one_frame(mask, 1, 4), prediction="released", resolution="grid")
    outside = -math.log(1 - 0.5 / (0.5 + 1e-6))
    assert loss.item() == pytest.approx((2 * 100 + 2 * outside) / 4, rel=1e-3)


# ---- a gradient that does not fade ----


def logits_gradient(patches, choice, seed, supervised, layers=6):
    """Norm over all layers' logits of one row; a centred rectangle is the mask of the first `supervised` patches."""
    frames, h, w = patches
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(1, frames * h * w, generator=generator).requires_grad_() for _ in range(layers)]
    mask = torch.zeros(4 * h, 4 * w, dtype=torch.bool)
    mask[h : 3 * h, w : 3 * w] = True
    index = torch.arange(supervised)
    targets = MaskTargets(
        index * 0, index * h * w, torch.full_like(index, h), torch.full_like(index, w), index * 0, masks=[mask]
    )
    loss = mask_alignment_loss([layer.softmax(-1) for layer in logits], targets, **choice)
    return torch.stack([g.square().sum() for g in torch.autograd.grad(loss, logits)]).sum().sqrt().item()


def median_gradient(patches, supervised=1, seeds=9, **choice):
    return sorted(logits_gradient(patches, choice, seed, supervised) for seed in range(seeds))[seeds // 2]


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_min_max_gradient_does_not_fade(fusion, criterion, resolution):
    choice = {"fusion": fusion, "criterion": criterion, "prediction": "min_max", "resolution": resolution}
    assert median_gradient((16, 24, 32), **choice) >= median_gradient((2, 4, 4), **choice) / 20


def test_product_gradient_over_a_whole_video():
    """All patches supervised: 3e-1 at 2 x 4 x 4. At 16 x 24 x 32 "min_max" keeps half of it, "released" 1/70."""
    small, large, names = (2, 4, 4), (16, 24, 32), ("min_max", "released")
    norms = {n: [median_gradient(p, p[0], 5, fusion="product", prediction=n) for p in (small, large)] for n in names}
    assert 0.2 < norms["min_max"][0] < 0.5 and 0.2 < norms["released"][0] < 0.5
    assert norms["min_max"][1] > norms["min_max"][0] / 3
    assert norms["released"][1] < norms["released"][0] / 30


def test_default_gradient_does_not_depend_on_the_length_of_the_video(generator):
    """A softmax over the patch: other patches do not enter. By hand: that of a cross-entropy with the mask, weighted by
    its area, while probabilities are small."""
    logits = torch.randn(6, 1, 20, generator=generator).double().requires_grad_()
    mask = torch.rand(4, 5, generator=generator) < 0.4
    maps = list(logits.softmax(-1))
    loss = mask_alignment_loss(maps, one_frame(mask, 4, 5), resolution="grid")
    (gradient,) = torch.autograd.grad(loss, logits)
    f, m = logits.softmax(-1).mean(0).detach(), mask.flatten().double()
    inside = 1e-6 + (1 - 2e-6) * f
    upstream = -(1 - 2e-6) * (m / inside - (1 - m) / (1 - inside)) / 20 / 6
    p = logits.softmax(-1).detach()
    torch.testing.assert_close(gradient, p * (upstream - (p * upstream).sum(-1, keepdim=True)))
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("fusion", ("product", "none"))
def test_min_max_gradient_does_not_depend_on_the_video_length(fusion, criterion, generator):
    """The same logits in the patch, 128,000 more keys in the softmax: same loss, same gradient in the patch."""
    mask = torch.rand(21, 17, generator=generator) < 0.5
    targets = one_frame(mask, 5, 4)
    logits = torch.randn(6, 1, 20, generator=generator)
    rest = torch.randn(6, 1, 128_000, generator=generator)
    results = []
    for full in (logits, torch.cat([logits, rest], -1)):
        full = full.requires_grad_()
        how = {"fusion": fusion, "criterion": criterion, "prediction": "min_max"}
        loss = mask_alignment_loss(list(full.softmax(-1)), targets, **how)
        results.append((loss, torch.autograd.grad(loss, full)[0][..., :20]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-6)


# ---- zeros, constants, empty masks ----


@each_choice
@pytest.mark.parametrize("kind", ("some zero", "one peak", "all zero", "constant", "subnormal", "barely normal"))
def test_extreme_frames_give_finite_losses_and_gradients(choice, kind, generator):
    maps = [layer.float() for layer in random_maps(generator, rows=1, columns=30, used=30)]
    frame = {
        "some zero": torch.where(torch.arange(20) % 3 == 0, 0.0, 0.03),
        "one peak": F.one_hot(torch.tensor(11), 20).float(),
        "all zero": torch.zeros(20),
        "constant": torch.full((20,), 0.03),
        "subnormal": torch.arange(20) * 1e-44,
        "barely normal": torch.arange(1, 21) * 1.2e-38,
    }[kind]
    for layer in maps:
        layer[0, :20] = frame
    maps = with_graph(maps)
    mask = torch.rand(9, 11, generator=generator) < 0.5
    loss = mask_alignment_loss(maps, one_frame(mask, 4, 5), **choice)
    gradients = torch.autograd.grad(loss, maps)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if choice["prediction"] == "min_max":
        floor = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
        if choice["fusion"] in ("product", "none"):
            assert all((gradient[0, :20][frame < floor] == 0).all() for gradient in gradients)
        if kind in ("all zero", "constant") and choice["criterion"] not in ("kl", "mass"):
            assert all((gradient == 0).all() for gradient in gradients)


def test_attention_of_zero_counts_as_the_floor():
    floor = 2.0**-126 / 2.0**-23
    mask = torch.tensor([[True, False]])
    losses = [
        mask_alignment_loss([torch.tensor([[value, 0.5]])], one_frame(mask, 1, 2), criterion="kl").item()
        for value in (0.0, floor)
    ]
    assert losses[0] == losses[1] == pytest.approx(math.log(0.5 / floor))


@pytest.mark.parametrize("prediction", ["min_max", "released"])
def test_a_constant_patch_predicts_zero(prediction):
    """Also a grid of one cell. BCE against p = 0: the pixels inside cost a logarithm, those outside nothing."""
    mask = torch.tensor([[True, False], [False, False]])
    inside = {"min_max": -math.log(1e-6), "released": 100.0}[prediction]
    for maps, h, w in (([torch.full((1, 4), 0.25)], 2, 2), ([torch.full((1, 1), 0.7)], 1, 1)):
        targets = one_frame(mask, h, w)
        assert (predict(maps, targets, prediction=prediction).p == 0).all()
        assert mask_alignment_loss(maps, targets, prediction=prediction).item() == pytest.approx(inside / 4, rel=1e-5)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_empty_mask(fusion, prediction, resolution, generator):
    maps = with_graph(random_maps(generator, rows=1, columns=20, used=20), torch.float32)
    targets = one_frame(torch.zeros(13, 9, dtype=torch.uint8), 4, 5)
    values = {"iou": 1.0, "dice": 1.0, "kl": 0.0, "mass": 0.0, "bce": None, "focal": None}
    for criterion, value in values.items():
        loss = mask_alignment_loss(
            maps, targets, fusion=fusion, criterion=criterion, prediction=prediction, resolution=resolution
        )
        norm = sum(gradient.abs().sum() for gradient in torch.autograd.grad(loss, maps))
        assert norm.isfinite()
        if value is None:
            assert 0 < loss.item() < 20 and norm > 0
        else:
            assert loss.item() == value and norm == 0


@pytest.mark.parametrize("criterion", ("iou", "dice"))
def test_nothing_predicted_and_nothing_there_is_no_overlap(criterion):
    maps = with_graph([torch.full((1, 4), 0.25)])
    targets = one_frame(torch.zeros(4, 4, dtype=torch.bool), 2, 2)
    loss = mask_alignment_loss(maps, targets, criterion=criterion, prediction="min_max")
    assert loss.item() == 1
    assert (torch.autograd.grad(loss, maps)[0] == 0).all()


@each_choice
def test_not_a_number_is_not_hidden(choice, generator):
    maps = [layer.float() for layer in random_maps(generator, rows=1, columns=20, used=20)]
    maps[1][0, 3] = math.nan
    assert mask_alignment_loss(maps, one_frame(torch.ones(4, 5, dtype=torch.bool), 4, 5), **choice).isnan()


@each_choice
def test_no_pair_gives_zero_with_a_graph(choice):
    nothing = torch.zeros(0, dtype=torch.long)
    targets = MaskTargets(nothing, nothing, nothing, nothing, nothing, masks=())
    for rows in (3, 0):
        maps = with_graph([torch.rand(rows, 7) for _ in range(2)])
        loss = mask_alignment_loss(maps, targets, **choice)
        assert loss.shape == () and loss.item() == 0 and loss.dtype == torch.float32
        loss.backward()
        assert all(layer.grad.shape == layer.shape and (layer.grad == 0).all() for layer in maps)
    assert predict(maps, targets).p.shape == (1, 0) and targets.groups == ()
