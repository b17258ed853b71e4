"""What grid_metrics compares the maps of grid_prediction's cases with, and a judge of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from swim_kernels import grid_metrics
from tests.kernels.device import triton_on_device
from tests.kernels.grid_prediction_cases import FLOOR, make_inputs

EMPTY = 2  # pair whose mask has no pixel, in every case


@triton_on_device
def measure(layers, pairs, shares, centres, **options):
    return grid_metrics(layers, pairs, shares, centres, **options)


def make_metrics_inputs(case, fusion, dtype=torch.float64, seed=0):
    """layers, pairs, shares, centres"""
    layers, pairs, _ = make_inputs(case, fusion, dtype, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    shares = torch.rand(pairs.num_cells, generator=generator, dtype=torch.float64)
    shares *= torch.rand(pairs.num_cells, generator=generator) < 0.6
    centres = (torch.rand(pairs.num_cells, generator=generator) < 0.5).float()
    first, (height, width) = int(pairs.columns.first_cell[EMPTY]), pairs.sizes[EMPTY]
    for values in (shares, centres):
        values[first : first + height * width] = 0
    return layers, pairs, shares.to(torch.promote_types(dtype, torch.float32)), centres


def judge(layers, pairs, shares, centres, fusion) -> Tensor:
    """[K, P, 4] in float64, one pair after the other, from f itself and not its logarithm."""
    a = torch.stack(list(layers)).double()
    found = []
    for row, start, h, w, first, *_ in pairs.table.tolist():
        m, z = (values[first : first + h * w].double() for values in (shares, centres))
        frame = a[:, row, start : start + h * w]
        if fusion in ("mean", "add"):
            frame = frame.mean(0, keepdim=True)
        frame = frame.clamp_min(FLOOR if layers[0].dtype != torch.float64 else 0.0)
        frame = frame / frame.amax(1, keepdim=True)
        values = []
        for f in frame.prod(0, keepdim=True) if fusion == "product" else frame:
            low, high = f.min(), f.max()
            p = (f - low) / (high - low) if high > low else torch.zeros_like(f)
            hits = [pixel for pixel, value in zip(z.tolist(), f, strict=True) if value == high]
            hit, mass = sum(hits) / len(hits), float((f * m).sum() / f.sum())
            iou = float((p * m).sum() / (p + m - p * m).sum()) if m.any() else 0.0
            values.append([hit, mass, iou, 1.0] if m.any() else [0.0] * 4)
        found.append(values)
    return torch.tensor(found, dtype=torch.float64).transpose(0, 1)
