"""Sums of what each class of words looks at, layer by layer, from one forward of a batch.

Per pair of word token and temporal patch with a mask: the metrics of `swim_fast.loss.metrics`, and of the attention
within the patch, q = f / Σ f over its n cells,

entropy
    −Σ q log q / log n: 0 for one cell, 1 for attention that is spread evenly.
gamepoint
    The masked share of the ⌈n / 20⌉ cells with the most attention, cells that tie sharing their places.

Per word token, in the model's own causal softmax: visual_share, what falls on visual tokens. A *sink* is a token to
which every word token of a sample, two or more, gives at least 0.05 of its attention and at least ten times what even
attention of the last word token would give; its share is the mean over the word tokens. Of the fused layers, the causal
shares are the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swim_fast.analysis.samples import WordSample, name_token
from swim_fast.analysis.words import CLASSES
from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.loss.mask_loss import GridPredictions
from swim_kernels import grid_metrics

# Summed over pairs, which the sixth sum counts; and over tokens, which the last counts.
PAIR_METRICS = ("entropy", "mass_in_mask", "pointing_accuracy", "gamepoint", "soft_iou")
WORD_METRICS = (*PAIR_METRICS, "visual_share")

_SINK, _SINK_OVER_EVEN, _TOP = 0.05, 10, 20


@torch.no_grad()
def measure_words(
    model: Any, processor: Any, samples: Sequence[WordSample], layers: list[int], fused: list[int], fusion: str
) -> list[dict[str, Any]]:
    """Return what is kept of each sample.

    Args:
        model: attached at `layers`.
        processor: the model's.
        samples: all with rows.
        layers: ascending.
        fused: those among them that are fused.
        fusion: mean, add or product.

    Returns:
        `sums`: layer, or "fused" -> class -> sums of `PAIR_METRICS`, number of pairs, sum of visual_share, number of
        tokens; `sinks`: layer, or "fused" -> name of a token -> its share; `words`: class -> number.
    """
    batch = Collator(processor, frames=True)(samples)
    queries, targets = batch["noun_queries"].to(model.device), batch["mask_targets"].to(model.device)
    inputs = model_inputs(batch, model.device, model.dtype)
    maps = model(**inputs, noun_queries=queries, use_cache=False, logits_to_keep=1).attentions
    chosen = [maps[layers.index(layer)] for layer in fused]
    pairs = torch.cat([_measure_pairs(maps, targets, "none"), _measure_pairs(chosen, targets, fusion)]).cpu()
    names = [*map(str, layers), "fused"]
    found, first_row, first_pair = [], 0, 0
    for sample in samples:
        rows = slice(first_row + sample.first_causal, first_row + len(sample.rows))
        part = slice(first_pair, first_pair + len(sample.pairs))
        first_row, first_pair = rows.stop, part.stop
        causal = torch.stack([layer[rows] for layer in maps]).unflatten(1, (len(sample.words), -1))
        causal = causal.flatten(2)[..., : sample.length].double()
        causal = torch.cat([causal, causal[[layers.index(layer) for layer in fused]].mean(0, keepdim=True)]).cpu()
        found.append(_sum_sample(sample, names, pairs[:, part], causal, processor.tokenizer))
    return found


def _measure_pairs(maps: Sequence[Tensor], targets: Any, fusion: str) -> Tensor:
    """Return `PAIR_METRICS` and 1 of every pair, zeros where its mask has no pixel: float64 [layers or 1, P, 6]."""
    predictions = GridPredictions.from_maps(maps, targets, fusion=fusion)
    shares, centres = targets.cell_shares(torch.float32), targets.cell_targets[1]
    hit, mass, iou, one = (
        grid_metrics(predictions.maps, targets.pairs, shares, centres, fusion=fusion).double().unbind(-1)
    )
    entropy, game = torch.zeros_like(hit), torch.zeros_like(hit)
    for group in targets.groups:
        log_q = targets.frames(group, predictions.log_f).double().flatten(2)
        share = targets.frames(group, shares).double().flatten(1)
        cells = log_q.shape[-1]
        if cells > 1:
            entropy[:, group.pairs] = -torch.xlogy(log_q.exp(), log_q.exp()).sum(-1) / torch.tensor(cells).log().item()
        count = -(-cells // _TOP)
        least = log_q.topk(count).values[..., -1:]
        above, level = log_q > least, log_q == least
        places = (count - above.sum(-1)) / level.sum(-1)
        game[:, group.pairs] = ((above * share).sum(-1) + places * (level * share).sum(-1)) / count
    return torch.stack([entropy * one, mass, hit, game * one, iou, one], dim=-1)


def _sum_sample(
    sample: WordSample, names: Sequence[str], pairs: Tensor, causal: Tensor, tokenizer: Any
) -> dict[str, Any]:
    """Return the entry of one sample; pairs [K, P, 6] and causal maps [K, W, length], the last of K fused."""
    visual = causal[..., sample.inputs["mm_token_type_ids"][: sample.length] != 0].sum(-1)
    of_pair = [sample.classes[sample.tags[pair.row]] for pair in sample.pairs]
    of_token = [sample.classes[tag] for tag, _ in sample.words]
    sums: dict[str, Any] = {name: {} for name in names}
    for kind in dict.fromkeys(of_token):
        chosen = pairs[:, [i for i, other in enumerate(of_pair) if other == kind]].sum(1)
        tokens = [i for i, other in enumerate(of_token) if other == kind]
        for k, name in enumerate(names):
            sums[name][kind] = [*chosen[k].tolist(), visual[k, tokens].sum().item(), len(tokens)]
    shares, least = causal.mean(1), max(_SINK, _SINK_OVER_EVEN / sample.length)
    is_sink = (causal.amin(1) >= least) & (len(sample.words) > 1)  # [K, length]
    sinks: dict[str, dict[str, float]] = {name: {} for name in names}
    for k, position in is_sink.nonzero().tolist():
        name = name_token(sample, position, tokenizer)
        sinks[names[k]][name] = sinks[names[k]].get(name, 0.0) + shares[k, position].item()
    kinds = [sample.classes[tag] for tag in dict.fromkeys(sample.tags)]
    words = {kind: kinds.count(kind) for kind in CLASSES if kind in kinds}
    return {"sums": sums, "sinks": sinks, "words": words}


def average_words(sums: Sequence[float]) -> dict[str, float]:
    """Return the mean of each of `WORD_METRICS`, NaN without pairs or tokens, and both numbers."""
    *totals, pairs, visual, tokens = sums
    values = [total / pairs if pairs else float("nan") for total in totals]
    values.append(visual / tokens if tokens else float("nan"))
    return {**dict(zip(WORD_METRICS, values, strict=True)), "pairs": int(pairs), "tokens": int(tokens)}
