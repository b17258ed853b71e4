"""One record as a page: its frames under the outlines of their masks, its text with the tagged nouns, its tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from swim_fast.viz.heatmap_grid import HeatmapColumn, heatmap_grid
from swim_fast.viz.overlay import draw_outline, resize_frame
from swim_fast.viz.report import data_uri, write_page

# Distinct on photographs and under black letters (Okabe and Ito's palette for all kinds of colour vision, reordered).
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (0, 114, 178))
LONGER_SIDE = 560  # pixels of a frame on the page


@dataclass(frozen=True)
class Frame:
    """A frame that the model sees, uint8 [H, W, 3], its index and time in words, and a mask [Hm, Wm] by noun."""

    image: np.ndarray
    label: str = ""
    masks: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Patch:
    """A temporal patch: its token positions in words, its frames, and the nouns that are supervised in it."""

    name: str
    tokens: str
    frames: Sequence[Frame]
    nouns: Sequence[int] = ()


@dataclass(frozen=True)
class Piece:
    """A stretch of text, or a token with its position; its role is answer, label, special, visual or "" (plain)."""

    text: str
    role: str = ""
    noun: int | None = None
    position: str = ""


@dataclass
class RecordView:
    """Values that the page of a record shows.

    Attributes:
        title: file, index and name.
        facts: heading, value and detail of each.
        nouns: the tagged nouns in order; elsewhere they are named by their index.
        text: the conversation as the model reads it.
        tokens: its tokens, those of a video or image as one.
        rows: of each attention row its noun, token, position, range of the softmax and supervised patches.
        patches: temporal patches; none in text.
        grid: height and width of a patch in visual tokens.
        notes: what a user would want to know.
    """

    title: str
    facts: list[tuple[str, str, str]]
    nouns: list[str]
    text: list[Piece]
    tokens: list[Piece]
    rows: list[tuple[int, str, int, str, list[int]]] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    grid: Sequence[int] = (1, 1)
    notes: list[str] = field(default_factory=list)


def write_record_page(path: str | os.PathLike[str], view: RecordView) -> Path:
    """Write a record as one HTML file that needs nothing else."""
    colours = [f"rgb{colour}" for colour in COLOURS]
    return write_page(path, "record.html", view=view, colours=colours, picture=lambda f: data_uri(outline_masks(f)))


def draw_frames(path: str | os.PathLike[str], view: RecordView) -> Path:
    """Draw the frames of a record, which has some, into a PNG."""
    frames = [frame for patch in view.patches for frame in patch.frames]
    columns = [HeatmapColumn(outline_masks(frame), None, [], frame.label) for frame in frames]
    per_line = max(4, 2 * round(math.sqrt(len(frames)) / 1.4))
    heatmap_grid(columns, path, title=view.title, map_labels=(), mask_label="", per_line=per_line)
    return Path(path)


def outline_masks(frame: Frame) -> np.ndarray:
    """Scale a frame and outline each mask in the colour of its noun: uint8 [h, w, 3]."""
    scale = LONGER_SIDE / max(frame.image.shape)
    image = resize_frame(frame.image, *(max(1, round(scale * side)) for side in frame.image.shape[:2]))
    for noun, mask in frame.masks.items():
        image = draw_outline(image, mask, colour=COLOURS[noun % len(COLOURS)], width=LONGER_SIDE // 130)
    return image
