"""Charts: curves over the steps of a run, metrics over layers, counts of a set of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from swim_fast.files import atomic_write

BLUE, RED, GREEN = "#3b6ea5", "#c0603b", "#5a9367"


def draw_curves(path: str | Path, panels: Mapping[str, Mapping[str, Mapping[int, float]]], xlabel: str) -> None:
    """Draw curves of shares (0 to 1) side by side into a PNG.

    Args:
        path: PNG to write; its folder is made if absent.
        panels: title -> name of a curve -> step -> value.
        xlabel: name of the steps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(values.keys(), values.values(), marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def draw_layers(
    path: str | Path,
    layers: Mapping[int, Mapping[str, float]],
    fused: Mapping[str, float],
    fused_layers: Sequence[int],
) -> None:
    """Draw metrics over the layers into a PNG: one panel each, the value of the fused layers as a dashed line.

    Args:
        path: PNG to write; its folder is made if absent.
        layers: layer -> metric -> value.
        fused: metric -> value of the layers fused.
        fused_layers: layers that were fused.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 2.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(fused)), fused, strict=True):
        values = {layer: layers[layer][metric] for layer in layers}
        axes.plot(list(values), list(values.values()), color="0.6", marker=".", zorder=1)
        marked = [layer for layer in fused_layers if layer in values]
        axes.scatter(marked, [values[layer] for layer in marked], color=BLUE, s=24, zorder=2, label="fused layers")
        axes.axhline(fused[metric], color=BLUE, linestyle="--", linewidth=1, label="fused")
        axes.set_title(metric.replace("_", " "), fontsize=10)
        axes.set_xlabel("layer")
        axes.set_ylim(0, max(1e-3, 1.15 * max(*values.values(), fused[metric])))
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_classes(
    path: str | Path, panels: Mapping[str, Sequence[Mapping[str, Mapping[int, float]]]], models: Sequence[str]
) -> None:
    """Draw shares of classes over the layers into a PNG: a panel each, a colour a class, dashed for the second model.

    Args:
        path: PNG to write; its folder is made if absent.
        panels: title -> for each model: class -> layer -> value from 0 to 1, or NaN.
        models: their names, one or two.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    grid = figure.subplots(2, -(-len(panels) // 2), sharex=True, squeeze=False).flatten()
    colours = {"noun": BLUE, "attribute": RED, "other noun": GREEN}
    for axes, (title, found) in zip(grid, panels.items(), strict=False):
        for model, style, classes in zip(models, ("-", "--"), found, strict=False):
            for kind, values in classes.items():
                label = kind if len(models) == 1 else f"{kind}, {Path(model).name}"
                colour = colours.get(kind, "0.6")
                axes.plot(list(values), list(values.values()), style, color=colour, marker=".", label=label)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[-(-len(panels) // 2) :]:
        axes.set_xlabel("layer")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _save(figure, path)


def draw_counts(
    path: str | Path,
    title: str,
    nouns: Mapping[str, int],
    tags_per_record: Mapping[int, int],
    areas: Sequence[float],
    frames: Sequence[int],
) -> None:
    """Draw the counts of a set into a PNG.

    Args:
        path: PNG to write; its folder is made if absent.
        title: stands above.
        nouns: tagged noun -> number, in the order in which they are drawn.
        tags_per_record: number of tags -> number of records.
        areas: share of the frame of each mask.
        frames: number of annotated frames of each object.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3 + max(4.0, 0.22 * len(nouns))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    axes = left.subplots()
    axes.barh(list(nouns)[::-1], list(nouns.values())[::-1], color=BLUE)
    axes.set(title="tagged nouns", xlabel="tags")
    per_record, area, annotated = right.subplots(3)
    per_record.bar(list(tags_per_record), list(tags_per_record.values()), color=BLUE)
    per_record.set(title="tags of a record", xlabel="tags", ylabel="records")
    per_record.xaxis.get_major_locator().set_params(integer=True)
    if len(areas):
        area.hist(areas, bins=np.geomspace(min(areas) * 0.99, 1.0, 40), color=RED)
        area.set(xscale="log")
    area.set(title="masks", xlabel="share of the frame", ylabel="masks")
    counted = Counter(frames)
    annotated.bar(list(counted), list(counted.values()), color=GREEN)
    annotated.set(title="annotated frames", xlabel="frames of an object with a mask", ylabel="objects")
    annotated.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    _save(figure, path)


def _save(figure, path: str | Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)
