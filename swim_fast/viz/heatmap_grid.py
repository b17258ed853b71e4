"""Attention maps as pictures: over a frame, and as a grid of frames x {mask, map, map, …}.

Arrays are numpy: frames uint8 [H, W, 3] RGB, masks any dtype [Hm, Wm] (non-zero is the object), maps [h, w] with one
number per visual token, in any unit, such as `p` of `swim_fast.loss.mask_loss.grid_predictions`. A map's colours run
from its own minimum to its own maximum, as the loss sees it. matplotlib is imported only when a picture is made, and
without pyplot: no display, no global state, safe in threads and worker processes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORMAP = "inferno"  # perceptually uniform, and black at 0: what gets no attention stays dark
OUTLINE = (64, 224, 255)  # not in the colormap

LEGEND = "Outline: the object's mask. Highest attention: ○ inside, × outside of it."
PANEL_PIXELS = 256  # height of a panel
DPI = 150


@dataclass(frozen=True)
class HeatmapColumn:
    """One frame of a `heatmap_grid`.

    Attributes:
        frame: uint8 [H, W, 3].
        mask: [Hm, Wm] of the frame's aspect ratio, or None if nobody annotated it.
        maps: one [h, w] per map row of the grid, or None where there is none.
        label: written above, for example "frame 12".
    """

    frame: np.ndarray
    mask: np.ndarray | None
    maps: Sequence[np.ndarray | None]
    label: str = ""


def normalise_map(values: np.ndarray) -> np.ndarray:
    """Min-max to [0, 1], fp32, same shape; a constant map becomes 0.

    Raises:
        ValueError: not [h, w], empty, or not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a map must be [h, w] with cells, got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("a map holds NaN or infinite values: look at the run that made it")
    spread = values.max() - values.min()
    return ((values - values.min()) / (spread or 1.0)).astype(np.float32)


def upsample_map(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w] to fp32 [height, width], bilinear with half-pixel centres: the loss's own upsampling."""
    cells = torch.from_numpy(np.array(values, dtype=np.float32))[None, None]
    return F.interpolate(cells, size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def overlay_map(
    frame: np.ndarray, values: np.ndarray, *, colormap: str = COLORMAP, opacity: float = 0.85
) -> np.ndarray:
    """The map's colours over the frame.

    The frame loses most of its own colour, so that hue means attention only; the higher the attention, the more of the
    colormap covers it.

    Args:
        frame: uint8 [H, W, 3].
        values: [h, w], see `normalise_map`.
        colormap: a matplotlib name.
        opacity: of the colour at the map's maximum, in [0, 1].

    Returns:
        uint8 [H, W, 3].
    """
    from matplotlib import colormaps

    frame = _checked_frame(frame)
    strength = upsample_map(normalise_map(values), *frame.shape[:2])[..., None]
    colour = colormaps[colormap](strength[..., 0])[..., :3] * 255
    grey = frame @ np.array([0.299, 0.587, 0.114])
    muted = 0.6 * (0.35 * frame + 0.65 * grey[..., None])
    alpha = opacity * np.sqrt(strength)
    return _to_uint8(muted * (1 - alpha) + colour * alpha)


def overlay_mask(frame: np.ndarray, mask: np.ndarray, *, colour: tuple[int, int, int] = OUTLINE) -> np.ndarray:
    """The frame dimmed outside of the mask, which is outlined; the object keeps its own colours.

    Args:
        frame: uint8 [H, W, 3].
        mask: [Hm, Wm], brought to the frame's size.
        colour: of the outline, RGB, 0 to 255.

    Returns:
        uint8 [H, W, 3].
    """
    frame = _checked_frame(frame)
    inside = resize_mask(mask, *frame.shape[:2])[..., None]
    return draw_outline(_to_uint8(np.where(inside, frame, 0.65 * frame)), mask, colour=colour)


def draw_outline(
    image: np.ndarray, mask: np.ndarray, *, colour: tuple[int, int, int] = OUTLINE, width: int | None = None
) -> np.ndarray:
    """The image with a line around the mask and a thin dark one around that, to be seen on any background.

    Args:
        image: uint8 [H, W, 3].
        mask: [Hm, Wm], brought to the image's size.
        colour: RGB, 0 to 255.
        width: in pixels; by default 1/100 of the shorter side, at least 1.

    Returns:
        uint8 [H, W, 3]. The line runs just outside of the mask; where the mask touches the border there is none.
    """
    image = _checked_frame(image).copy()
    inside = resize_mask(mask, *image.shape[:2])
    width = width or max(1, round(min(image.shape[:2]) / 100))
    line = _grow(inside, width)
    halo = _grow(line, max(1, width // 2))
    image[halo & ~line] = image[halo & ~line] // 4
    image[line & ~inside] = colour
    return image


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest pixel (centres): [Hm, Wm] to bool [height, width]."""
    mask = np.asarray(mask) != 0
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"a mask must be [Hm, Wm] with pixels, got shape {list(mask.shape)}")
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip((height, width), mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


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
    """Frames side by side: the mask in the first row, then one row per map, with the mask's outline and the map's peak.

    Args:
        columns: at least one; frames may differ in size, each is scaled to the same panel height.
        path: where to write a PNG, folders included; None to only return the figure.
        title: for example the sentence with its noun; long ones are wrapped.
        map_labels: names of the map rows, from top to bottom, as many as each column has maps.
        mask_label: name of the first row.
        colormap: a matplotlib name.
        per_line: columns side by side before the grid goes on below; None: all of them.

    Returns:
        matplotlib Figure with an Agg canvas.

    Raises:
        ValueError: no column, a column with another number of maps, arrays that are not frame, mask or map; the column
        is named.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not columns:
        raise ValueError("heatmap_grid needs at least one column")
    panels = []  # [column][row] uint8 images
    for number, column in enumerate(columns):
        if len(column.maps) != len(map_labels):
            raise ValueError(f"column {number} has {len(column.maps)} maps, map_labels names {len(map_labels)}")
        try:
            panels.append(_panels(column, colormap))
        except ValueError as error:
            raise ValueError(f"column {number} ({column.label or 'no label'}): {error}") from error

    # All lengths in inches, from the top left corner.
    height = PANEL_PIXELS / DPI
    widths = [height * images[0].shape[1] / images[0].shape[0] for images in panels]
    gap, left, right = 0.05, 0.32, 0.62
    per_line = per_line or len(columns)
    bands = [range(first, min(first + per_line, len(columns))) for first in range(0, len(columns), per_line)]
    total_width = left + max(sum(widths[i] for i in band) + gap * (len(band) - 1) for band in bands) + right
    marked = bool(map_labels) and any(column.mask is not None for column in columns)
    legend = textwrap.wrap(LEGEND, max(20, int((total_width - left) * 16))) if marked else []
    bottom = 0.1 + 0.16 * len(legend)
    lines = textwrap.wrap(title, max(20, int(total_width * 10))) if title else []
    label_height = 0.22 if any(column.label for column in columns) else 0
    rows = 1 + len(map_labels)
    band_height = label_height + rows * height + (rows - 1) * gap
    first_top = 0.1 + 0.22 * len(lines) + label_height
    total_height = first_top - label_height + len(bands) * band_height + (len(bands) - 1) * 3 * gap + bottom
    figure = Figure(figsize=(total_width, total_height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def axes_at(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / total_width, 1 - (y + h) / total_height, w / total_width, h / total_height))

    def write(x: float, y: float, text: str, **style) -> None:
        # A noun may hold a dollar sign; it is not mathematics.
        figure.text(x / total_width, 1 - y / total_height, text, parse_math=False, **style)

    for number, line in enumerate(lines):
        write(total_width / 2, 0.08 + 0.22 * number, line, ha="center", va="top", fontsize=11, fontweight="bold")
    for number, band in enumerate(bands):
        x, top = left, first_top + number * (band_height + 3 * gap)
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
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return figure


def _panels(column: HeatmapColumn, colormap: str) -> list[np.ndarray]:
    """The column's images from top to bottom, all of one size."""
    frame = _scaled(_checked_frame(column.frame))
    images = [frame if column.mask is None else overlay_mask(frame, column.mask)]
    for values in column.maps:
        image = frame if values is None else overlay_map(frame, values, colormap=colormap)
        images.append(image if column.mask is None else draw_outline(image, column.mask))
    return images


def _mark_peak(axes: Axes, values: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> None:
    """Ring or cross at the centre of the map's greatest cell: hit or miss in the pointing game of `metrics`."""
    values = np.asarray(values)
    if values.min() == values.max():
        return
    cell = np.unravel_index(values.argmax(), values.shape)
    y, x = ((index + 0.5) * pixels / cells for index, pixels, cells in zip(cell, size, values.shape, strict=True))
    inside = resize_mask(mask, *values.shape)[cell]
    for colour, line in (("black", 3.0), ("white", 1.4)):
        style = {"facecolors": "none", "edgecolors": colour} if inside else {"c": colour}
        axes.scatter(x - 0.5, y - 0.5, s=36, marker="o" if inside else "x", linewidths=line, clip_on=False, **style)


def _draw_scale(axes: Axes, colormap: str) -> None:
    axes.imshow(np.linspace(1, 0, 256)[:, None], aspect="auto", cmap=colormap, extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.set_yticks([0, 1], ["frame's\nmin", "frame's\nmax"], fontsize=6)
    axes.yaxis.tick_right()
    axes.tick_params(length=2, pad=2)


def _scaled(frame: np.ndarray) -> np.ndarray:
    """To panel height, so that outlines are as fine on a small frame as on a large one."""
    size = (PANEL_PIXELS, max(1, round(PANEL_PIXELS * frame.shape[1] / frame.shape[0])))
    image = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
    return _to_uint8(image[0].permute(1, 2, 0).numpy())


def _grow(mask: np.ndarray, width: int) -> np.ndarray:
    """Dilation by a disc of radius `width`."""
    radius = width + 0.5
    grown = np.zeros_like(mask)
    padded = np.pad(mask, width)
    for dy in range(-width, width + 1):
        for dx in range(-width, width + 1):
            if dy * dy + dx * dx <= radius * radius:
                grown |= padded[width + dy : width + dy + mask.shape[0], width + dx : width + dx + mask.shape[1]]
    return grown


def _checked_frame(frame: np.ndarray) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise ValueError(f"a frame must be uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    return frame


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
