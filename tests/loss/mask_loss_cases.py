"""Cases of the mask loss, and a float64 loop over pairs written straight from the formulas that judges it."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from swim_fast.loss.mask_loss import (
    CRITERIA,
    FUSIONS,
    PREDICTIONS,
    RESOLUTIONS,
    GridPredictions,
    MaskTargets,
    compute_pair_losses,
)

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


def vars_of(targets, dtype):
    names = ("row", "start", "height", "width", "mask")
    return {name: getattr(targets, name).to(dtype) for name in names} | {"masks": tuple(targets.masks)}
