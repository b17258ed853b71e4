"""Runs side by side as one page: curves, metrics, settings, and a gallery in which every word can be asked."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from swim_fast.viz.overlay import resize_frame
from swim_fast.viz.report import data_uri, write_page

COLOURS = ("#d55e00", "#2a8fd6", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of the runs (Okabe and Ito)
LONGER_SIDE = 384  # pixels of a frame on the page
MAPS_BYTES = 6_000_000  # of all clips together, before base64
WIDTH, HEIGHT = 320, 130  # of a curve, in the units of its drawing


@dataclass
class RunView:
    """Values that the report shows of a run.

    Attributes:
        label: its name on the page.
        settings: key, value, and if it was changed from the default.
        curves: by title and name of the set, (step, value) pairs.
        metrics: set, name and value of the last evaluation.
        skipped: fields of each problem.
        notes: what could not be shown, and why.
    """

    label: str
    settings: list[tuple[str, str, bool]] = field(default_factory=list)
    model: str = ""
    data: list[str] = field(default_factory=list)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    metrics: list[tuple[str, str, float]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Word:
    """A stretch of the sentence; `index` is that of its maps, None without; `tag` that of its masks."""

    text: str
    span: tuple[int, int]
    in_answer: bool
    tag: int | None = None
    index: int | None = None


@dataclass
class ClipView:
    """A clip: frames uint8 [H, W, 3], masks by tag and frame, words, and answers and maps by run.

    `maps[run][layer]` is fp32 [words, frames, h, w] in [0, 1]; `patches` says which temporal patch each frame is of.
    """

    title: str
    name: str
    frames: list[np.ndarray]
    labels: list[str]
    patches: list[int]
    masks: list[list[np.ndarray | None]]
    words: list[Word]
    question: tuple[int, int]
    answer: tuple[int, int]
    answers: dict[str, str] = field(default_factory=dict)
    maps: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def first_frame(self) -> int:
        """Index of the frame that is shown first: one with a mask of the first object that has any."""
        shown = (at for of_tag in self.masks for at, mask in enumerate(of_tag) if mask is not None and mask.any())
        return next(shown, 0)


def write_run_page(
    path: str | os.PathLike[str], runs: Sequence[RunView], clips: Sequence[ClipView], notes: Sequence[str]
) -> Path:
    """Write runs as one HTML file that needs nothing else."""
    titles = list(dict.fromkeys(title for run in runs for title in run.curves))
    budget = MAPS_BYTES // max(1, len(clips) * len(runs))
    return write_page(
        path,
        "run_report.html",
        runs=runs,
        notes=notes,
        clips=clips,
        colours=COLOURS,
        charts=[(title, _chart([run.curves.get(title, {}) for run in runs])) for title in titles],
        metrics=_table(runs),
        data=_script_json([_clip_data(clip, budget) for clip in clips]),
    )


def _table(runs: Sequence[RunView]) -> list[tuple[str, str, list[float | None]]]:
    found = [{(name, metric): value for name, metric, value in run.metrics} for run in runs]
    keys = dict.fromkeys(key for of_run in found for key in of_run)
    return [(*key, [of_run.get(key) for of_run in found]) for key in keys]


def _chart(curves: Sequence[Mapping[str, Sequence[tuple[float, float]]]]) -> dict:
    """Return the lines of a chart, scaled into its drawing, and the ends of its axes."""
    points = [point for of_run in curves for line in of_run.values() for point in line if math.isfinite(point[1])]
    last = max((step for step, _ in points), default=1) or 1
    low, high = min((y for _, y in points), default=0), max((y for _, y in points), default=1)
    spread = (high - low) or 1
    lines = []
    for run, of_run in enumerate(curves):
        for name, line in of_run.items():
            scaled = [
                f"{step / last * WIDTH:.1f},{HEIGHT - (y - low) / spread * HEIGHT:.1f}"
                for step, y in line
                if math.isfinite(y)
            ]
            lines.append({"run": run, "name": name, "points": " ".join(scaled)})
    return {"lines": lines, "low": f"{low:.4g}", "high": f"{high:.4g}", "last": f"{last:,}"}


def _script_json(value) -> Markup:
    """Return JSON that can stand in a script tag: no text in it ends the tag or a line of JavaScript."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)  # U+2028 is escaped as all that is not ASCII
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _clip_data(clip: ClipView, budget: int) -> dict:
    height, width = clip.frames[0].shape[:2]
    scale = min(1.0, LONGER_SIDE / max(height, width)) if max(height, width) > LONGER_SIDE else 1.0
    size = max(1, round(scale * height)), max(1, round(scale * width))
    return {
        "frames": [data_uri(resize_frame(frame, *size)) for frame in clip.frames],
        "labels": clip.labels,
        "height": size[0],
        "width": size[1],
        "outlines": [[None if mask is None else _outline(mask, size) for mask in of_tag] for of_tag in clip.masks],
        "runs": {run: {name: _grid(maps, budget // len(of_run)) for name, maps in of_run.items()}
                 for run, of_run in clip.maps.items()},
    }  # fmt: skip


def _grid(maps: np.ndarray, budget: int) -> dict:
    """Quantise maps [words, frames, h, w] to bytes, on a coarser grid where they would be larger than `budget`."""
    words, frames, height, width = maps.shape
    factor = max(1.0, math.sqrt(maps.size / max(1, budget)))
    h, w = max(1, int(height / factor)), max(1, int(width / factor))
    flat = maps.reshape(-1, height, width)
    if (h, w) != (height, width):
        flat = np.stack([np.asarray(Image.fromarray(m).resize((w, h), Image.Resampling.BOX)) for m in flat])
    values = np.clip(flat * 255 + 0.5, 0, 255).astype(np.uint8)
    return {"h": h, "w": w, "frames": frames, "bytes": base64.b64encode(values.tobytes()).decode()}


def _outline(mask: np.ndarray, size: tuple[int, int]) -> str:
    """Return the edge of a mask as a transparent PNG of a size."""
    inside = np.asarray(Image.fromarray((mask > 0).astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)) > 0
    around = np.pad(inside, 2)
    height, width = size
    shifted = [around[y : y + height, x : x + width] for y in (1, 2, 3) for x in (1, 2, 3)]
    edge = np.logical_or.reduce(shifted) & ~np.logical_and.reduce(shifted)
    image = np.zeros((*size, 2), np.uint8)
    image[..., 0], image[..., 1] = 255, edge * 255
    file = io.BytesIO()
    Image.fromarray(image, "LA").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
