"""Measure grounding: the attention of tagged nouns inside their masks, layer by layer, on NL-Refer records."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from swim_fast.config import RunConfig
from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.sample.builder import Sample
from swim_fast.evaluation.run import Batch, Ranks, Run, Work
from swim_fast.families import get_attentions, get_default_layers, get_eligible_layers
from swim_fast.jobs import Grounding
from swim_fast.loss.mask_loss import GridPredictions
from swim_fast.loss.metrics import METRICS, average_metrics, sum_metrics
from swim_fast.loss.ranking_metrics import sum_ranking_metrics
from swim_fast.modeling import attach_noun_attention
from swim_fast.options import RANKING_METRICS, AttentionLoss, NounRows

# Sums of a prediction by the layer's name, or "fused" -> the metrics that they are sums of. Ranking pixels costs a sort
# per map and mask, so that only the fused layers are ranked, each and together.
_SUMS = {"sums": METRICS, "ranking": RANKING_METRICS}


def supervised_layers(trained: RunConfig | None, num_layers: int, eligible: Sequence[int]) -> list[int]:
    """Return the layers that a model was trained on; if that is unknown, `get_default_layers` of those eligible."""
    chosen = trained.attention_loss.layers if trained and trained.attention_loss else None
    return sorted(layer % num_layers for layer in chosen) if chosen else get_default_layers(eligible)


def evaluate_grounding(options: Grounding, ranks: Ranks) -> dict[str, Any] | None:
    """Measure the `METRICS` and `RANKING_METRICS` over the pairs of noun token and temporal patch of a file.

    Rows, softmax and fusion that the options do not name are those of the run that made the model. With layers "all"
    the supervised ones alone are fused.

    Returns:
        The results of `score_grounding`, on the first rank; None on the others.

    Raises:
        DataError: the file cannot be read.
        CheckpointError: the model cannot be loaded.
        ValueError: a layer that it does not have.
        PredictionsError: the folder holds predictions of another run.
    """
    run, layers = Run(options, ranks), options.layers
    how = choose_maps(options, run.trained)
    fusion, rows = how["fusion"], {name: how[name] for name in NounRows.model_fields}
    settings = run.settings("grounding", layers=layers, **how, metrics=[*METRICS, *RANKING_METRICS])

    def prepare() -> Work:
        model, processor = run.load()
        chosen, fused = attach_chosen_layers(model, options, run.trained)
        builder = run.sample_builder(processor, read_out="supervised", **rows)
        collate = Collator(processor, frames=True)

        def build(index: int) -> Sample:
            record = run.records[index]
            return builder(record) if record.objects else Sample(record.name, {})

        def predict(batch: Batch) -> list[dict[str, Any]]:
            samples = [sample for _, sample in batch]
            with_rows = [sample for sample in samples if sample.rows]
            sums = iter(_compute_sums(model, collate, with_rows, chosen, fused, fusion) if with_rows else ())
            return [next(sums) if sample.rows else {"sums": {}} for sample in samples]

        return Work(build, predict)

    entries = run.predict(run.indices, settings, prepare, "looking")
    if entries is None:
        return None
    return {"settings": settings, **score_grounding({n: entry for n, entry in entries.items() if n in run.indices})}


def choose_maps(options: Grounding, trained: RunConfig | None) -> dict[str, str]:
    """Return fusion and the options of `NounRows`: as given, else as in training, else the defaults."""
    loss = (trained and trained.attention_loss) or AttentionLoss()
    how = {name: getattr(loss, name) for name in ("fusion", *NounRows.model_fields)}
    how["fusion"] = loss.shown_fusion
    return how | {name: value for name, value in options.given().items() if name in how}


def attach_chosen_layers(model, options: Grounding, trained: RunConfig | None) -> tuple[list[int], list[int]]:
    """Attach noun attention at the layers of the options; return them, ascending, and those of them that are fused."""
    count, eligible = len(get_attentions(model)), get_eligible_layers(model)
    supervised = supervised_layers(trained, count, eligible)
    chosen = {"all": eligible, "supervised": supervised}.get(str(options.layers), options.layers)
    attach_noun_attention(model, chosen, options.backend)
    chosen = sorted(layer % count for layer in chosen)
    return chosen, supervised if options.layers == "all" else chosen


@torch.no_grad()
def _compute_sums(
    model, collate: Collator, samples: Sequence[Sample], layers: list[int], fused: list[int], fusion: str
) -> list[dict[str, Any]]:
    """Return the sums of each sample: by layer, and of the fused layers together."""
    batch = collate(samples)
    queries = batch["noun_queries"].to(model.device)
    outputs = model(
        **model_inputs(batch, model.device, model.dtype), noun_queries=queries, use_cache=False, logits_to_keep=1
    )
    found, row, pair = [], 0, 0
    for sample in samples:
        rows, pairs = slice(row, row + len(sample.rows)), slice(pair, pair + len(sample.pairs))
        row, pair = rows.stop, pairs.stop
        maps = [layer[rows] for layer in outputs.attentions]
        targets = batch["mask_targets"]
        own = {name: getattr(targets, name)[pairs] for name in ("start", "height", "width", "mask")}
        targets = dataclasses.replace(targets, row=targets.row[pairs] - rows.start, **own).to(model.device)
        by_layer = sum_metrics(GridPredictions.from_maps(maps, targets, fusion="none")).tolist()
        fused_maps = [maps[layers.index(layer)] for layer in fused]
        together = GridPredictions.from_maps(fused_maps, targets, fusion=fusion)
        sums = {str(layer): values for layer, values in zip(layers, by_layer, strict=True)}
        ranked = sum_ranking_metrics(GridPredictions.from_maps(fused_maps, targets, fusion="none")).tolist()
        ranking = {str(layer): values for layer, values in zip(fused, ranked, strict=True)}
        found.append(
            {
                "sums": sums | {"fused": sum_metrics(together).tolist()},
                "ranking": ranking | {"fused": sum_ranking_metrics(together).tolist()},
                "fused_layers": fused,
            }
        )
    return found


def score_grounding(entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Average over all pairs.

    Args:
        entries: predictions by record index; `sums`: layer (or "fused") -> `sum_metrics`; `ranking`: fused layer (or
            "fused") -> `sum_ranking_metrics`; or `problem`.

    Returns:
        `layers`: layer -> the `METRICS`; `fused`: the same of the fused layers, which are `fused_layers`; `records`:
        number of those with pairs; `pairs`: their number; `ranking`: `layers`, `fused` and `pairs` of the
        `RANKING_METRICS`; `without`: number of records without tagged noun; `problems`: record index -> why nothing is
        known of it.
    """
    problems = {index: entry["problem"] for index, entry in entries.items() if "problem" in entry}
    looked = [entry for entry in entries.values() if entry.get("sums")]
    averages = {kind: _average([entry[kind] for entry in looked], names) for kind, names in _SUMS.items()}
    return {
        **averages["sums"],
        "ranking": averages["ranking"],
        "fused_layers": looked[0]["fused_layers"] if looked else [],
        "records": len(looked),
        "without": len(entries) - len(looked) - len(problems),
        "problems": problems,
    }


def _average(sums: Sequence[Mapping[str, Sequence[float]]], names: Collection[str]) -> dict[str, Any]:
    """Average metrics over records: by layer, of the fused layers, and the number of pairs."""
    totals: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(len(names) + 1, dtype=torch.float64))
    for one in sums:
        for name, values in one.items():
            totals[name] += torch.tensor(values, dtype=torch.float64)
    fused = totals["fused"]
    layers = {name: average_metrics(totals[name], names) for name in sorted(totals.keys() - {"fused"}, key=int)}
    return {"layers": layers, "fused": average_metrics(fused, names), "pairs": int(fused[-1])}
