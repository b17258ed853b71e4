"""The way that the mask loss is computed: precisions, batching, memory, predictions and area averages."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swim_fast.loss.mask_loss import (
    CRITERIA,
    FUSIONS,
    PREDICTIONS,
    MaskTargets,
    compute_pair_losses,
    mask_alignment_loss,
)
from swim_fast.loss.metrics import sum_metrics
from swim_fast.loss.targets import average_mask
from swim_kernels import PackedMasks
from tests.loss.mask_loss_cases import (
    CHOICES,
    each_choice,
    judge_average_mask,
    one_frame,
    pair_losses,
    predict,
    random_maps,
    random_targets,
    relative_error,
    vars_of,
    with_graph,
)


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
