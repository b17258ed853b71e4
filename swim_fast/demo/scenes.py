"""What is to be seen in a demo clip: objects, their colours, sizes, paths and order in depth, drawn from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from swim_fast.demo.drawing import COLOURS, SHAPES

NOUNS = tuple(SHAPES)
COLOUR_NAMES = tuple(COLOURS)
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1), "": (0, 0)}
SPLITS = ("train", "heldout")


def is_held_out(noun: str, colour: str) -> bool:
    """Whether this combination is kept for the held-out split: one colour of each noun."""
    return NOUNS.index(noun) % len(COLOUR_NAMES) == COLOUR_NAMES.index(colour)


@dataclass(frozen=True)
class ClipOptions:
    """Shape of the clips; the defaults suit :class:`swim_fast.demo.checkpoint.ModelSize`.

    ``width`` and ``height`` in pixels (even, for H.264); ``num_frames`` at ``fps`` frames per second; ``annotated`` frames
    carry masks; an object is annotated where its visible mask covers the centre of one of the ``cell`` × ``cell`` squares,
    the smallest thing that a visual token can point at.
    """

    width: int = 168
    height: int = 140
    num_frames: int = 12
    fps: int = 6
    annotated: int = 4
    cell: int = 28
    min_objects: int = 3
    max_objects: int = 3
    min_radius: float = 20.0
    max_radius: float = 29.0
    keyframe_interval: int = 6
    crf: int = 20

    def __post_init__(self) -> None:
        if self.width % 2 or self.height % 2:
            raise ValueError(f"clips of {self.width}x{self.height} pixels: H.264 wants an even width and height")
        if not 1 <= self.annotated <= self.num_frames:
            raise ValueError(f"annotated is {self.annotated}; it must lie between 1 and num_frames, {self.num_frames}")
        if not 1 <= self.min_objects <= self.max_objects <= len(NOUNS):
            raise ValueError(
                f"min_objects {self.min_objects} and max_objects {self.max_objects} must lie between 1 and {len(NOUNS)}, "
                "the number of different nouns, and be in order"
            )


@dataclass(frozen=True)
class Item:
    """One object: what it is, how it looks and its straight path from ``start`` to ``end`` (centre, x and y in pixels)."""

    noun: str
    colour: str
    radius: float
    tilt: float
    direction: str
    start: tuple[float, float]
    end: tuple[float, float]

    def centre(self, share: float) -> tuple[float, float]:
        """Where it is after this share (0 to 1) of the clip."""
        return tuple(a + (b - a) * share for a, b in zip(self.start, self.end, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn; later items lie in front of earlier ones."""

    items: tuple[Item, ...]
    annotated: tuple[int, ...]
    texture_seed: int


def random_scene(seed: int, split: str, number: int, options: ClipOptions | None = None) -> Scene:
    """The scene of clip ``number`` of a split: its nouns differ from each other, and so do its colours.

    Training scenes hold no combination of :func:`is_held_out`; every held-out scene holds at least one.
    """
    options = options or ClipOptions()
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    while True:
        items = _random_items(rng, split, options)
        if items is not None:
            break
    step = options.num_frames // options.annotated
    first = int(rng.integers(options.num_frames - step * (options.annotated - 1)))
    annotated = tuple(first + step * i for i in range(options.annotated))
    return Scene(items, annotated, int(rng.integers(2**31)))


def _random_items(rng: np.random.Generator, split: str, options: ClipOptions) -> tuple[Item, ...] | None:
    """Draw objects; None if their looks or paths turn out unfit."""
    count = int(rng.integers(options.min_objects, options.max_objects + 1))
    nouns = rng.permutation(NOUNS)[:count].tolist()
    colours = rng.permutation(COLOUR_NAMES)[:count].tolist()
    if any(map(is_held_out, nouns, colours)) != (split == "heldout"):
        return None
    items = []
    for noun, colour in zip(nouns, colours, strict=True):
        radius = float(rng.uniform(options.min_radius, options.max_radius))
        direction = str(rng.choice(list(DIRECTIONS)))
        path = _random_path(rng, radius, DIRECTIONS[direction], options)
        items.append(Item(noun, colour, radius, float(rng.uniform(-14, 14)), direction, *path))
    # Objects may pass behind each other, but each stays partly in sight.
    for i, one in enumerate(items):
        for other in items[i + 1 :]:
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                if math.dist(one.centre(share), other.centre(share)) < 0.62 * (one.radius + other.radius):
                    return None
    return tuple(items)


def _random_path(
    rng: np.random.Generator, radius: float, direction: tuple[int, int], options: ClipOptions
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end of a path along ``direction`` that stays in the picture."""
    low, high = np.array([radius, radius]), np.array([options.width, options.height]) - radius
    length = float(rng.uniform(0.6, 1.0)) * min(options.width, options.height) * 0.5
    move = length * np.array(direction, dtype=np.float64)
    start = rng.uniform(low - np.minimum(move, 0), high - np.maximum(move, 0))
    end = start + move
    return (float(start[0]), float(start[1])), (float(end[0]), float(end[1]))
