"""Where the attention of tagged nouns lies, layer by layer, on a set with masks (NL-Refer records)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.sample.builder import Sample
from swim_fast.data.source.records import RecordFile
from swim_fast.evaluation.predictions import Predictions
from swim_fast.evaluation.ranks import Ranks
from swim_fast.evaluation.run import RunOptions, predict_rest
from swim_fast.inference.generation import load_model
from swim_fast.loss.mask_loss import GridPredictions
from swim_fast.loss.metrics import METRICS, average_metrics, sum_metrics
from swim_fast.modeling import attach_noun_attention
from swim_fast.modeling.families import get_attentions, get_default_layers

FUSIONS = ("product", "mean")


def read_layers(text: str) -> list[int] | str:
    """The layers that an option names: "all", "supervised", or numbers with commas.

    Raises:
        ValueError: something else.
    """
    if text in ("all", "supervised"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers is {text!r}; give all, supervised or numbers such as 2,7,12") from None


def supervised_layers(folder: str, num_layers: int) -> list[int]:
    """The layers that a checkpoint was trained on, as the configuration in its folder says; without one, every fifth
    counted back from the last."""
    import yaml

    path = Path(folder) / "config.yaml"
    try:
        chosen = yaml.safe_load(path.read_text(encoding="utf-8"))["attention_loss"]["layers"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        chosen = None
    return sorted(layer % num_layers for layer in chosen) if chosen else get_default_layers(num_layers)


def evaluate_grounding(
    options: RunOptions,
    ranks: Ranks,
    layers: list[int] | str = "all",
    *,
    fusion: str = "product",
    query_position: str = "noun",
    softmax: str = "causal",
    backend: str = "auto",
) -> dict[str, Any] | None:
    """Pointing accuracy, mass in mask and soft IoU over the pairs of noun token and temporal patch of a file.

    Args:
        options, ranks: how the model is run.
        layers: "all", "supervised" (see `supervised_layers`) or their numbers.
        fusion: of the layers; with layers "all" the supervised ones alone are fused.
        query_position, softmax: as in `SampleOptions`.
        backend: of the kernels.

    Returns:
        What `score_grounding` makes of it, on the first rank; None on the others.

    Raises:
        DataError: the file cannot be read.
        ValueError: a model that cannot be loaded or a layer that it does not have; predictions of another run in the
            folder.
    """
    records = RecordFile(options.file, options.media)
    numbers = range(options.count(len(records)))
    how = {"query_position": query_position, "softmax": softmax}
    settings = options.settings("grounding", layers=layers, fusion=fusion, **how)
    with Predictions(options.out, settings) as predictions:
        if any(number not in predictions.done for number in numbers):
            model, processor = load_model(options.model, options.dtype, options.attention, ranks.device)
            count = len(get_attentions(model))
            supervised = supervised_layers(options.model, count)
            chosen = {"all": list(range(count)), "supervised": supervised}.get(str(layers), layers)
            attach_noun_attention(model, chosen, backend)
            chosen = sorted(layer % count for layer in chosen)
            fused = supervised if layers == "all" else chosen
            builder = options.sample_builder(processor, read_out="supervised", **how)
            collate = Collator(processor)

            def build(number: int) -> Sample:
                record = records[number]
                return builder(record) if record.objects else Sample(record.name, {})

            def look(batch: list[tuple[int, Sample]]) -> list[dict[str, Any]]:
                samples = [sample for _, sample in batch]
                with_rows = [sample for sample in samples if sample.rows]
                sums = iter(_sums(model, collate, with_rows, chosen, fused, fusion) if with_rows else ())
                return [next(sums) if sample.rows else {"sums": {}} for sample in samples]

            predict_rest(numbers, build, look, predictions, options, ranks, desc="looking")
        if ranks.rank:
            return None
        entries = predictions.entries()
    return {"settings": settings, **score_grounding({n: e for n, e in entries.items() if n in numbers})}


@torch.no_grad()
def _sums(
    model, collate: Collator, samples: Sequence[Sample], layers: list[int], fused: list[int], fusion: str
) -> list[dict[str, Any]]:
    """`sum_metrics` of each sample: by layer, and of the fused layers."""
    batch = collate(samples)
    queries = batch["noun_queries"].to(model.device)
    outputs = model(**model_inputs(batch, model.device), noun_queries=queries, use_cache=False, logits_to_keep=1)
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
        together = sum_metrics(GridPredictions.from_maps(fused_maps, targets, fusion=fusion)).tolist()
        sums = {str(layer): values for layer, values in zip(layers, by_layer, strict=True)}
        found.append({"sums": {**sums, "fused": together}, "fused_layers": fused})
    return found


def score_grounding(entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over all pairs.

    Args:
        entries: by record number; ``sums``: layer (or "fused") -> `sum_metrics`, or ``problem``.

    Returns:
        ``layers``: layer -> the `METRICS`; ``fused``: the same of the fused layers, which are ``fused_layers``;
        ``records`` with pairs, ``pairs``, ``without``: the number of records without tagged noun, and ``problems``:
        record number -> why nothing is known of it.
    """
    problems = {number: entry["problem"] for number, entry in entries.items() if "problem" in entry}
    looked = [entry for entry in entries.values() if entry.get("sums")]
    totals: dict[str, torch.Tensor] = {}
    for entry in looked:
        for name, values in entry["sums"].items():
            totals[name] = totals.get(name, torch.zeros(len(METRICS) + 1, dtype=torch.float64)) + torch.tensor(
                values, dtype=torch.float64
            )
    fused = totals.pop("fused", torch.zeros(len(METRICS) + 1, dtype=torch.float64))
    return {
        "layers": {name: average_metrics(totals[name]) for name in sorted(totals, key=int)},
        "fused": average_metrics(fused),
        "fused_layers": looked[0]["fused_layers"] if looked else [],
        "records": len(looked),
        "pairs": int(fused[-1]),
        "without": len(entries) - len(looked) - len(problems),
        "problems": problems,
    }


def draw_grounding(results: Mapping[str, Any], path: Path) -> None:
    """Draw the metrics over the layers to a PNG: one panel each, the fused value as a dashed line.

    Args:
        results: of `score_grounding`, with pairs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [int(layer) for layer in results["layers"]]
    figure = Figure(figsize=(9.6, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        values = {layer: results["layers"][str(layer)][metric] for layer in layers}
        axes.plot(layers, list(values.values()), color="0.6", marker=".", zorder=1)
        fused = [layer for layer in results["fused_layers"] if layer in values]
        axes.scatter(fused, [values[layer] for layer in fused], color="tab:blue", s=24, zorder=2, label="fused layers")
        axes.axhline(results["fused"][metric], color="tab:blue", linestyle="--", linewidth=1, label="fused")
        axes.set_title(metric.replace("_", " "), fontsize=10)
        axes.set_xlabel("layer")
        axes.set_ylim(0, max(1e-3, 1.15 * max(*values.values(), results["fused"][metric])))
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
