"""Attention maps as a grid of frames x {mask, map, map, …}; see `swim_fast.viz.overlay` for the arrays.

matplotlib is imported only when a picture is made, and without pyplot: no display, no global state, safe in threads and
worker processes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from swim_fast.files import atomic_write
from swim_fast.viz.overlay import (
    COLORMAP,
    PictureError,
    check_frame,
    draw_outline,
    overlay_map,
    overlay_mask,
    resize_frame,
    resize_mask,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND = "Outline: the object's mask. Highest attention: ○ inside, × outside of it."
PANEL_PIXELS = 256  # height of a panel
DPI = 150


@dataclass(frozen=True)
class HeatmapColumn:
    """One frame of a `heatmap_grid`.

    Attributes:
        frame: uint8 [H, W, 3].
        mask: [Hm, Wm] of the aspect ratio of the frame, or None for a frame without annotation.
        maps: one [h, w] per map row of the grid, or None where there is none.
        label: written above, for example "frame 12".
    """

    frame: np.ndarray
    mask: np.ndarray | None
    maps: Sequence[np.ndarray | None]
    label: str = ""


def heatmap_grid(
    columns: Sequence[HeatmapColumn],
    path: str | Path | None = None,
    *,
    title: str = "",
    map_labels: Sequence[str] = ("attention",),
    mask_label: str = "mask",
    colormap: str = COLORMAP,
    per_line: int | None = None,
) -> Figure:
    """Draw frames side by side: the mask in the first row, then a row per map with its peak and the mask's outline.

    Args:
        columns: at least one; frames may differ in size, each is scaled to the same panel height.
        path: PNG to write, folders included; None to only return the figure.
        title: for example the sentence with its noun; long ones are wrapped.
        map_labels: names of the map rows, from top to bottom, as many as each column has maps.
        mask_label: name of the first row.
        colormap: name of a matplotlib colormap.
        per_line: columns side by side before the grid continues below; None: all of them.

    Returns:
        matplotlib Figure with an Agg canvas.

    Raises:
        PictureError: no column, or, naming the column, another number of maps or arrays that cannot be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not columns:
        raise PictureError("heatmap_grid needs at least one column")
    panels = []  # [column][row] uint8 images
    for index, column in enumerate(columns):
        if len(column.maps) != len(map_labels):
            raise PictureError(f"column {index} has {len(column.maps)} maps, map_labels names {len(map_labels)}")
        try:
            panels.append(_draw_panels(column, colormap))
        except PictureError as error:
            raise PictureError(f"column {index} ({column.label or 'no label'}): {error}") from error

    # All lengths in inches, from the top left corner; a band is the columns side by side.
    height = PANEL_PIXELS / DPI
    widths = [height * images[0].shape[1] / images[0].shape[0] for images in panels]
    gap, left, right = 0.05, 0.32, 0.62 if map_labels else 0.1
    indices, per_line = range(len(columns)), per_line or len(columns)
    bands = [indices[first : first + per_line] for first in indices[::per_line]]
    total_width = left + max(sum(widths[i] + gap for i in band) for band in bands) - gap + right
    marked = bool(map_labels) and any(column.mask is not None for column in columns)
    legend = textwrap.wrap(LEGEND, max(20, int((total_width - left) * 16))) if marked else []
    lines = textwrap.wrap(title, max(20, int(total_width * 9)))
    rows, label_height = 1 + len(map_labels), 0.22 if any(column.label for column in columns) else 0
    band_step = label_height + rows * (height + gap) + 2 * gap
    first_top, bottom = 0.1 + 0.22 * len(lines) + label_height, 0.1 + 0.16 * len(legend)
    total_height = first_top - label_height + len(bands) * band_step - 3 * gap + bottom
    figure = Figure(figsize=(total_width, total_height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def axes_at(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / total_width, 1 - (y + h) / total_height, w / total_width, h / total_height))

    def write(x: float, y: float, text: str, **style) -> None:
        # A noun may hold a dollar sign; it is not mathematics.
        figure.text(x / total_width, 1 - y / total_height, text, parse_math=False, **style)

    for index, line in enumerate(lines):
        write(total_width / 2, 0.08 + 0.22 * index, line, ha="center", va="top", fontsize=10, fontweight="bold")
    for index, band in enumerate(bands):
        x, top = left, first_top + index * band_step
        for i in band:
            column, width = columns[i], widths[i]
            write(x + width / 2, top - 0.05, column.label, ha="center", va="bottom", fontsize=8)
            for row, image in enumerate(panels[i]):
                axes = axes_at(x, top + row * (height + gap), width, height)
                axes.imshow(image, aspect="auto", interpolation="none")
                axes.set_axis_off()
                if row > 0 and column.maps[row - 1] is not None and column.mask is not None:
                    _mark_peak(axes, column.maps[row - 1], column.mask, image.shape[:2])
            x += width + gap
        for row, label in enumerate((mask_label, *map_labels)):
            middle = top + row * (height + gap) + height / 2
            write(left / 2, middle, label, ha="center", va="center", rotation=90, fontsize=8)
        if map_labels:
            _draw_scale(axes_at(x + 0.05, top + height + gap, 0.1, (rows - 1) * (height + gap) - gap), colormap)
    if legend:
        write(left, total_height - bottom + 0.06, "\n".join(legend), ha="left", va="top", fontsize=7, color="0.25")
    if path is not None:
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png")
    return figure


def _draw_panels(column: HeatmapColumn, colormap: str) -> list[np.ndarray]:
    """The images of a column from top to bottom, all of one height, so that outlines are as fine on a small frame."""
    height, width = check_frame(column.frame).shape[:2]
    frame = resize_frame(column.frame, PANEL_PIXELS, max(1, round(PANEL_PIXELS * width / height)))
    images = [frame if column.mask is None else overlay_mask(frame, column.mask)]
    for values in column.maps:
        image = frame if values is None else overlay_map(frame, values, colormap=colormap)
        images.append(image if column.mask is None else draw_outline(image, column.mask))
    return images


def _mark_peak(axes: Axes, values: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> None:
    """Mark the centre of the greatest cell with a ring or a cross: hit or miss in the pointing game of `metrics`."""
    values = np.asarray(values)
    if values.min() == values.max():
        return
    cell = np.unravel_index(values.argmax(), values.shape)
    y, x = (np.array(cell) + 0.5) * size / values.shape - 0.5
    inside = resize_mask(mask, *values.shape)[cell]
    for colour, line in (("black", 3.0), ("white", 1.4)):
        style = {"facecolors": "none", "edgecolors": colour} if inside else {"c": colour}
        axes.scatter(x, y, s=36, marker="o" if inside else "x", linewidths=line, clip_on=False, **style)


def _draw_scale(axes: Axes, colormap: str) -> None:
    axes.imshow(np.linspace(1, 0, 256)[:, None], aspect="auto", cmap=colormap, extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.set_yticks([0, 1], ["frame's\nmin", "frame's\nmax"], fontsize=6)
    axes.yaxis.tick_right()
    axes.tick_params(length=2, pad=2)
