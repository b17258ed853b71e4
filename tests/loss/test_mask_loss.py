"""The mask loss against a float64 loop over pairs written straight from the formulas, and its numerical promises."""

import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from swim_fast.loss import released as released_loss
from swim_fast.loss.mask_loss import (
    CRITERIA,
    FUSIONS,
    PREDICTIONS,
    RESOLUTIONS,
    GridPredictions,
    MaskTargets,
    compute_pair_losses,
    mask_alignment_loss,
)
from swim_fast.loss.metrics import sum_metrics
from swim_fast.loss.targets import average_mask
from swim_kernels import PackedMasks

CHOICES = [
    dict(zip(("fusion", "criterion", "prediction", "resolution"), values, strict=True))
    for values in itertools.product(FUSIONS, CRITERIA, PREDICTIONS, RESOLUTIONS)
]
predict = GridPredictions.from_maps
each_choice = pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice.values()))


def pair_losses(maps, targets, criterion, resolution, **options):
    return compute_pair_losses(predict(maps, targets, **options), criterion, resolution)


# ---- the judge: one pair at a time, one formula a line ----


def judge_upsample_matrix(cells, pixels, dtype):
    """[pixels, cells]: linear interpolation, half-pixel centres, clamped at the ends."""
    matrix = torch.zeros(pixels, cells, dtype=dtype)
    for i in range(pixels):
        x = min(max((i + 0.5) * cells / pixels - 0.5, 0.0), cells - 1.0)
        low = min(int(x), cells - 1)
        matrix[i, low] += 1 - (x - low)
        matrix[i, min(low + 1, cells - 1)] += x - low
    return matrix


def judge_overlap_matrix(cells, pixels, dtype):
    """[cells, pixels]: the share of the cell's length that lies in the pixel."""
    matrix = torch.zeros(cells, pixels, dtype=dtype)
    for i, j in itertools.product(range(cells), range(pixels)):
        start, end = i * pixels / cells, (i + 1) * pixels / cells
        matrix[i, j] = max(0.0, min(end, j + 1) - max(start, j)) / (end - start)
    return matrix


def judge_average_mask(mask, height, width, dtype):
    rows, columns = (judge_overlap_matrix(c, n, dtype) for c, n in zip((height, width), mask.shape, strict=True))
    return rows @ mask.to(dtype) @ columns.T


def judge_criterion(f, log_f, mask, criterion, prediction, resolution):
    """One patch's loss; f and log_f [h, w], each up to what the prediction allows."""
    share = judge_average_mask(mask, *f.shape, f.dtype)
    if criterion == "kl":
        return -(share / share.sum() * (log_f - log_f.flatten().logsumexp(0))).sum() if share.sum() > 0 else f.sum() * 0
    if criterion == "mass":
        f = (log_f - log_f.max()).exp()
        return -((share * f).sum() / f.sum()).log() if share.sum() > 0 else f.sum() * 0
    if prediction == "probability":
        p = f
    elif f.max() == f.min():
        p = f * 0
    elif prediction == "released":
        p = (f - f.min()) / (f.max() - f.min() + 1e-6)
    else:
        p = (f - f.min()) / (f.max() - f.min())
    m = share
    if resolution == "mask":
        up, across = (judge_upsample_matrix(c, n, f.dtype) for c, n in zip(f.shape, mask.shape, strict=True))
        p, m = up @ p @ across.T, mask.to(f.dtype)
    if criterion in ("bce", "focal"):
        if prediction == "released":
            log_p, log_q = (torch.where(x > 0, x, 1).log().clamp_min(-100) - 100 * (x == 0) for x in (p, 1 - p))
        else:
            inside = 1e-6 + (1 - 2e-6) * p
            log_p, log_q = inside.log(), (1 - inside).log()
        focus = (1.0, 1.0) if criterion == "bce" else ((1 - p) ** 2, p**2)
        return -(m * focus[0] * log_p + (1 - m) * focus[1] * log_q).mean()
    if criterion == "iou":
        return 1 - (p * m).sum() / (p + m - p * m).sum()
    return 1 - 2 * (p * m).sum() / (p.sum() + m.sum())


def judge(maps, targets, *, fusion="mean", criterion="bce", prediction="probability", resolution="mask"):
    """[P] losses in the maps' own precision."""
    losses = []
    for i in range(len(targets)):
        row, start = int(targets.row[i]), int(targets.start[i])
        h, w = int(targets.height[i]), int(targets.width[i])
        mask = targets.masks[int(targets.mask[i])]
        layers = [layer[row] for layer in maps]
        if fusion == "product":
            fused = [math.prod(layers[1:], start=layers[0])]
        elif fusion == "mean":
            fused = [sum(layers) / len(layers)]
        elif fusion == "add":
            fused = [sum(layers)]
        else:
            fused = layers
        per_map = []
        for number, f in enumerate(fused):
            patch = slice(start, start + h * w)
            if prediction == "released":
                f = (f / (f.sum() + 1e-6))[patch].view(h, w)
                log_f = f.log()
            else:
                log_f = f[patch].log()
                if fusion == "product":
                    log_f = sum(layer[patch].log() for layer in layers)
                elif fusion == "none":
                    log_f = layers[number][patch].log()
                log_f = (log_f - log_f.max()).view(h, w)
                f = f[patch].view(h, w).clamp(max=1) if prediction == "probability" else log_f.exp()
            per_map.append(judge_criterion(f, log_f, mask, criterion, prediction, resolution))
        losses.append(torch.stack(per_map).mean())
    return torch.stack(losses)


# ---- inputs ----


def random_maps(generator, rows=5, columns=160, used=150, layers=3, spread=1.5):
    """float64 softmaxes over the first `used` columns; the rest is padding, 0."""
    logits = torch.randn(layers, rows, used, generator=generator, dtype=torch.float64) * spread
    return list(F.pad(logits.softmax(-1), (0, columns - used)))


def random_targets(generator):
    """Odd grids, masks that do not divide, are smaller than the grid, are shared, are empty; pairs that share a row and
    whose groups are interleaved."""
    sizes = [(19, 23), (40, 30), (3, 5), (19, 23), (24, 18)]
    masks = [(torch.rand(size, generator=generator) < 0.4).to(torch.uint8) for size in sizes]
    masks[1] = masks[1].bool()
    masks[4] = torch.zeros(sizes[4], dtype=torch.uint8)
    masks[4][6:20, 5:11] = 1
    pairs = [  # row, start, h, w, mask
        (0, 0, 4, 5, 0),
        (0, 20, 4, 5, 3),
        (1, 3, 6, 7, 1),
        (2, 100, 4, 5, 0),
        (4, 17, 6, 7, 2),
        (2, 50, 7, 3, 4),
        (3, 80, 4, 5, 3),
    ]
    return MaskTargets(*torch.tensor(pairs).T.contiguous(), masks=masks)


def one_frame(mask, height, width):
    return MaskTargets(*torch.tensor([[0], [0], [height], [width], [0]]), masks=[mask])


def with_graph(maps, dtype=None):
    return [layer.detach().to(dtype or layer.dtype).clone().requires_grad_() for layer in maps]


def relative_error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


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


# ---- how it computes ----


@each_choice
def test_strides_precisions_and_repetition(choice, generator):
    """Any strides; the same bits every time; 16-bit maps are computed in fp32."""
    targets, maps = random_targets(generator), [layer.float() for layer in random_maps(generator)]
    odd = [torch.stack([layer, -layer], 1)[:, 0] for layer in maps]
    odd[1] = maps[1].T.contiguous().T
    assert not odd[0].is_contiguous() and not odd[1].is_contiguous()
    results = []
    for inputs in (maps, odd, maps):
        inputs = [layer.detach().requires_grad_() for layer in inputs]
        loss = mask_alignment_loss(inputs, targets, **choice)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for one, other, again in zip(*results, strict=True):
        assert torch.equal(one, again)
        assert relative_error(other, one) < 2e-6  # not the same bits: released sums run in another order
    rounded = [layer.bfloat16() for layer in maps]
    assert torch.equal(
        mask_alignment_loss(rounded, targets, **choice),
        mask_alignment_loss([layer.float() for layer in rounded], targets, **choice),
    )


@each_choice
def test_autocast_changes_nothing(choice, generator):
    targets, maps = random_targets(generator), [layer.float() for layer in random_maps(generator)]
    plain = mask_alignment_loss(maps, targets, **choice)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask_alignment_loss(maps, targets, **choice), plain)


def test_area_average_under_autocast(generator):
    masks = torch.rand(1, 719, 1279, generator=generator) < 0.5
    plain = average_mask(masks, (26, 46))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(average_mask(masks, (26, 46)), plain)


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@each_choice
def test_pairs_are_batched(choice, generator):
    """As many operations, backward included, for 40 pairs as for 2 of one size."""
    counts = []
    for pairs in (2, 40):
        index = torch.arange(pairs)
        targets = MaskTargets(
            index, index % 5, torch.full_like(index, 3), torch.full_like(index, 4), index * 0,
            masks=[torch.rand(7, 9, generator=generator) < 0.5],
        )  # fmt: skip
        maps = with_graph([torch.rand(pairs, 20, generator=generator) for _ in range(3)])
        with Operations() as operations:
            mask_alignment_loss(maps, targets, **choice).backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]


@each_choice
def test_nothing_is_read_back_from_the_device(choice, generator):
    """Tensors on the meta device have no values to read."""
    targets, maps = random_targets(generator).to("meta"), random_maps(generator)
    maps = [layer.float().to("meta").requires_grad_() for layer in maps]
    loss = mask_alignment_loss(maps, targets, **choice)
    loss.backward()
    assert loss.shape == () and maps[0].grad.shape == maps[0].shape


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_nothing_is_kept_of_the_pixels(criterion, prediction, generator):
    """The maps and a few numbers a cell; "released", several of them for each of its maps."""
    index = torch.arange(8)
    targets = MaskTargets(
        index * 0, index * 12, torch.full_like(index, 3), torch.full_like(index, 4), index * 0,
        masks=[torch.rand(240, 320, generator=generator) < 0.5],
    )  # fmt: skip
    maps = with_graph([torch.rand(1, 96, generator=generator) for _ in range(6)])
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = mask_alignment_loss(maps, targets, criterion=criterion, prediction=prediction)
    assert loss.requires_grad
    size = 96 * 4
    by_kernels = criterion == "bce" and prediction != "released"
    assert sum(kept.values()) <= (6 + 2 if by_kernels else 60) * size


@each_choice
def test_splitting_the_pairs_changes_nothing(choice, generator):
    """Sums over micro-batches, divided by all their pairs, are the mean over all pairs."""
    whole, maps = random_targets(generator), with_graph(random_maps(generator))
    losses = pair_losses(maps, whole, **choice)
    parts = []
    for chosen in (slice(0, 3), slice(3, 4), slice(4, 7)):
        fields = (whole.row, whole.start, whole.height, whole.width, whole.mask)
        part = MaskTargets(*(field[chosen] for field in fields), masks=whole.masks)
        parts.append(mask_alignment_loss(maps, part, **choice) * len(part))
    torch.testing.assert_close(sum(parts) / len(whole), losses.mean())
    torch.testing.assert_close(
        torch.autograd.grad(sum(parts) / len(whole), maps, retain_graph=True), torch.autograd.grad(losses.mean(), maps)
    )


# ---- predictions and area averages ----


@each_choice
def test_metrics_and_loss_leave_each_other_alone(choice, generator):
    """In any order, and without taking the loss's graph from it."""
    maps, targets = random_maps(generator), random_targets(generator)
    criterion, resolution = choice["criterion"], choice["resolution"]
    options = {"fusion": choice["fusion"], "prediction": choice["prediction"]}
    results = []
    for loss_first in (True, False):
        leaves = with_graph(maps)
        predictions = predict(leaves, targets, **options)
        if loss_first:
            losses, metrics = compute_pair_losses(predictions, criterion, resolution), sum_metrics(predictions)
        else:
            metrics, losses = sum_metrics(predictions), compute_pair_losses(predictions, criterion, resolution)
        assert losses.requires_grad and not metrics.requires_grad
        results.append((losses, metrics, *torch.autograd.grad(losses.sum(), leaves)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    detached = predictions.detach()
    for name in ("p", "log_f"):
        ours = getattr(predictions, name)
        assert getattr(predictions.detach(), name).data_ptr() == ours.data_ptr() and ours.requires_grad
        assert torch.equal(getattr(detached, name), ours) and not getattr(detached, name).requires_grad


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_grid_predictions(fusion, prediction, generator):
    maps, targets = random_maps(generator), random_targets(generator)
    seen = []
    predictions = predict(maps, targets, fusion=fusion, prediction=prediction)
    for group in targets.groups:
        p, log_f = targets.frames(group, predictions.p), targets.frames(group, predictions.log_f)
        seen += group.pairs.tolist()
        assert p.shape == log_f.shape == (3 if fusion == "none" else 1, len(group.pairs), *group.grid)
        assert (p.amin() > 0 if prediction == "probability" else p.amin() == 0) and p.amax() <= 1
        torch.testing.assert_close(log_f.exp().sum((-2, -1)), torch.ones(p.shape[:-2]).double())
        for i, pair in enumerate(group.pairs.tolist()):
            row, start = targets.row[pair], int(targets.start[pair])
            frame = torch.stack([layer[row, start : start + math.prod(group.grid)] for layer in maps])
            mean = frame.mean(0, keepdim=True)
            f = {"product": frame.prod(0, keepdim=True), "mean": mean, "add": mean, "none": frame}[fusion]
            expected = (f / f.sum(-1, keepdim=True)).unflatten(-1, group.grid)
            torch.testing.assert_close(log_f[:, i].exp(), expected)
            assert group.mask_indices[group.mask[i]] == targets.mask[pair]
            assert group.mask_size == targets.masks[targets.mask[pair]].shape
    assert sorted(seen) == list(range(len(targets)))


@pytest.mark.parametrize(
    "size, grid", [((19, 23), (4, 5)), ((3, 5), (6, 7)), ((12, 8), (3, 4)), ((7, 7), (7, 7)), ((5, 3), (1, 1))]
)
def test_average_mask(size, grid, generator):
    masks = torch.rand(2, *size, generator=generator) < 0.5
    expected = torch.stack([judge_average_mask(mask, *grid, torch.float64) for mask in masks])
    torch.testing.assert_close(average_mask(masks, grid, torch.float64), expected, rtol=1e-12, atol=1e-14)
    # Correctly rounded in fp32, and the whole area is kept.
    assert torch.equal(average_mask(masks, grid), average_mask(masks, grid, torch.float64).float())
    torch.testing.assert_close(average_mask(masks, grid).mean((1, 2)), masks.float().mean((1, 2)))


def test_area_average_divides_a_straddling_pixel():
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.uint8)
    assert average_mask(mask, (2, 2)).flatten().tolist() == pytest.approx([4 / 9, 0, 0, 0])
    middle = torch.tensor([[0, 1, 0]], dtype=torch.uint8)
    assert average_mask(middle, (1, 2)).tolist() == [[pytest.approx(1 / 3)] * 2]


@each_choice
def test_masks_may_come_packed(choice, generator):
    targets, maps = random_targets(generator), random_maps(generator)
    packed = MaskTargets(**vars_of(targets, torch.int64) | {"masks": PackedMasks.pack(targets.masks)})
    assert torch.equal(mask_alignment_loss(maps, packed, **choice), mask_alignment_loss(maps, targets, **choice))


@each_choice
def test_backends_agree(choice, generator):
    targets, maps = random_targets(generator), with_graph(random_maps(generator))
    results = []
    for backend in ("eager", "torch"):
        losses = pair_losses(maps, targets, **choice, backend=backend)
        results.append((losses, *torch.autograd.grad(losses.mean(), maps)))
    for eager, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, eager, rtol=1e-9, atol=1e-9)


def test_any_non_zero_pixel_is_the_object(generator):
    maps = [layer.float() for layer in random_maps(generator, rows=1, columns=20, used=20)]
    mask = (torch.rand(9, 7, generator=generator) < 0.5).to(torch.uint8)
    for choice in CHOICES:
        one, other = (mask_alignment_loss(maps, one_frame(m, 4, 5), **choice) for m in (mask, mask * 255))
        assert torch.equal(one, other)


# ---- targets ----


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


def vars_of(targets, dtype):
    names = ("row", "start", "height", "width", "mask")
    return {name: getattr(targets, name).to(dtype) for name in names} | {"masks": tuple(targets.masks)}


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
