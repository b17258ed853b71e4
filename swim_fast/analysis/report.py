"""The results of `swim-fast analyze` as Markdown, as CSV and as a plot."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swim_fast.analysis.measure import WORD_METRICS
from swim_fast.evaluation.report import problem_lines, table
from swim_fast.files import atomic_write
from swim_fast.viz.charts import draw_classes

_FREQUENT = 0.1  # share of the records


def words_report(results: Mapping[str, Any]) -> str:
    """Return the tables of `analyze`: classes of words fused, nouns and attributes by layer, sinks, layers to take."""
    settings, fused = results["settings"], results["fused_layers"]
    lines = ["# What the words of referring expressions look at", ""]
    words = ", ".join(f"{count} × {kind}" for kind, count in results["words"].items()) or "no words"
    lines += [f"{words}, in {results['records']} records; softmax {settings['softmax']}"]
    if results["not_analysed"]:
        lines.append(f"{results['not_analysed']} tagged nouns not analysed: their expression is no clear English")
    if results["without"]:
        lines.append(f"{results['without']} records have no analysed noun with a mask")
    if results["records"]:
        how = f"{settings['fusion']} of layers {', '.join(map(str, fused))}"
        lines += ["", f"## Classes of words, {how}", "", _class_table(results), "", "## By layer", "", _layers(results)]
        lines += ["", "## Sinks", "", *_sink_lines(results)]
        lines += ["", "## Layers in which nouns have most mass in the mask, a suggestion", ""]
        lines += [f"    layers: {results['suggested_layers']}"]
        if "noun" in results["words"] and "attribute" not in results["words"]:
            lines += ["", "No expression of this file has an attribute, so nouns cannot be compared with them."]
    lines += ["", "definitions: swim_fast/analysis/measure.py"]
    return "\n".join([*lines, *problem_lines(results["problems"], "no result")])


def _class_table(results: Mapping[str, Any]) -> str:
    rows = []
    for kind, values in results["fused"].items():
        rows.append([kind, *_numbers(values), str(values["tokens"]), results["settings"]["model"]])
        before = results.get("against")
        if before and kind in before["fused"]:
            values = before["fused"][kind]
            rows.append([kind, *_numbers(values), str(values["tokens"]), before["settings"]["model"]])
    return table(["words", *(name.replace("_", " ") for name in WORD_METRICS), "tokens", "model"], rows)


def _layers(results: Mapping[str, Any]) -> str:
    rows = []
    for layer, found in results["layers"].items():
        marked = f"{layer}{' *' if int(layer) in results['fused_layers'] else ''}"
        rows += [[marked, *_numbers(found[kind]), kind] for kind in ("noun", "attribute") if kind in found]
    return table(["layer", *(name.replace("_", " ") for name in WORD_METRICS), "words"], rows)


def _sink_lines(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {'fused' if name == 'fused' else f'layer {name}'}: {sink['token']}, {sink['share']:.2f} of the attention "
        f"in {sink['samples']} of {results['records']} records"
        for name, sinks in results["sinks"].items()
        for sink in sinks
        if sink["samples"] >= _FREQUENT * results["records"]
    ]
    return lines or [f"No token is a sink in {_FREQUENT:.0%} of the records."]


def _numbers(values: Mapping[str, float]) -> list[str]:
    return ["-" if values[name] != values[name] else f"{values[name]:.3f}" for name in WORD_METRICS]


def _models(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the results of both models, that against which the other is compared last."""
    return [results, results["against"]] if results.get("against") else [results]


def write_words(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write `words.csv`, a line per model, layer and class, and `words.png`; return their paths."""
    with atomic_write(folder / "words.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "layer", "class", *WORD_METRICS, "pairs", "tokens"])
        for one in _models(results):
            for layer, found in (*one["layers"].items(), ("fused", one["fused"])):
                for kind, values in found.items():
                    numbers = [f"{values[name]:.6g}" for name in WORD_METRICS]
                    writer.writerow(
                        [one["settings"]["model"], layer, kind, *numbers, values["pairs"], values["tokens"]]
                    )
    if not results["layers"]:
        return [folder / "words.csv"]
    panels = {
        name.replace("_", " "): [
            {
                kind: {int(layer): found[kind][name] for layer, found in one["layers"].items() if kind in found}
                for kind in one["words"]
            }
            for one in _models(results)
        ]
        for name in WORD_METRICS
    }
    draw_classes(folder / "words.png", panels, [one["settings"]["model"] for one in _models(results)])
    return [folder / "words.csv", folder / "words.png"]
