"""KL attention loss of "Direct Visual Grounding by Directing Attention of Visual Tokens" (arXiv 2511.12738), KLAL.

A row's attention, softmax over the visual keys and averaged over the heads, is a distribution Q over all of them. The
target P is given: here each visual token's share of the object's mask, whatever the mask is made of (a box and a disc
around a point are masks). The loss is KL(P ‖ Q) = Σ P log(P / Q), averaged over the layers.

Where the published loss asks the last token of an answer, this one asks the rows there are: those of the tagged nouns.
Frames of a video without a mask have no share of P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swim_fast.errors import OptionError
from swim_fast.loss.targets import MaskTargets
from swim_kernels.grid_prediction import floor_of

FUSIONS = ("none", "mean")  # divergence of each layer, averaged, as published; or that of the layers' mean


def compute_row_divergences(maps: list[Tensor], targets: MaskTargets, fusion: str = "none") -> Tensor:
    """Return KL(P ‖ Q) of the row of every pair: [P], so that a row counts as often as it has patches.

    Args:
        maps: one [R, N] per layer, fp32 or float64, of a softmax over visual keys; of one patch's ("frame") it is the
            divergence in that patch. Below the floor of `swim_kernels.grid_prediction` they count as that.
        targets: P pairs. A row whose masks have no pixel has 0.
        fusion: one of `FUSIONS`.

    Raises:
        OptionError: another fusion, whose sums over the keys are not 1.
    """
    if fusion not in FUSIONS:
        raise OptionError(f"criterion klal needs fusion none or mean, whose maps are distributions, not {fusion}")
    rows, columns = targets.pairs.cells
    layers = torch.stack([layer[rows, columns] for layer in maps])  # [layers, M]
    if fusion == "mean":
        layers = layers.mean(0, keepdim=True)
    share = targets.cell_shares(layers.dtype)
    area = layers.new_zeros(len(maps[0])).index_add(0, rows, share)
    wanted = share / torch.where(area == 0, 1, area)[rows]
    log_ratio = torch.where(wanted > 0, wanted, 1).log() - layers.clamp_min(floor_of(layers.dtype)).log()
    divergence = layers.new_zeros(len(layers), len(maps[0])).index_add(1, rows, wanted * log_ratio).mean(0)
    return divergence[targets.row.long()]
