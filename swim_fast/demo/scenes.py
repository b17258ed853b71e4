"""What is to be seen in a demo clip: objects, their shades, sizes, paths and order in depth, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from swim_fast.demo.drawing import SHADES, SHAPES

NOUNS = tuple(SHAPES)
SIZES = {"small": (19.0, 22.0), "big": (28.0, 31.0)}  # radius in pixels
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1), "": (0, 0)}
SPLITS = ("train", "heldout")


def is_held_out(nouns: Iterable[str]) -> bool:
    """Whether these nouns are seen together in held-out clips only: one in seven sets of three, all pairs being shared.

    Held-out looks of a noun instead would teach the model which answer never comes with it.
    """
    return sum(map(NOUNS.index, nouns)) % len(NOUNS) == 0


@dataclass(frozen=True)
class ClipOptions:
    """Shape of the clips; the defaults suit :class:`swim_fast.demo.tiny_model.ModelSize`.

    ``width`` and ``height`` are pixels (even, for H.264); ``num_frames`` at ``fps`` frames per second, of which
    ``annotated`` carry masks. An object is annotated where its visible mask covers the centre of one of the ``cell`` ×
    ``cell`` squares, the smallest thing that a visual token can point at.
    """

    width: int = 168
    height: int = 140
    num_frames: int = 12
    fps: int = 6
    annotated: int = 4
    cell: int = 28
    min_objects: int = 3
    max_objects: int = 3
    keyframe_interval: int = 6
    crf: int = 20

    def __post_init__(self) -> None:
        if self.width % 2 or self.height % 2:
            raise ValueError(f"clips of {self.width}x{self.height} pixels: H.264 wants an even width and height")
        least = math.ceil(4 * max(radius for _, radius in SIZES.values()))
        if min(self.width, self.height) < least:
            raise ValueError(
                f"clips of {self.width}x{self.height} pixels: both must be at least {least}, room for objects to move"
            )
        if not 1 <= self.annotated <= self.num_frames:
            raise ValueError(f"annotated is {self.annotated}; it must lie between 1 and num_frames, {self.num_frames}")
        if not 2 <= self.min_objects <= self.max_objects < len(NOUNS):
            raise ValueError(
                f"min_objects {self.min_objects} and max_objects {self.max_objects} must be in order and lie between 2 "
                f"and {len(NOUNS) - 1}, for {len(NOUNS)} different nouns"
            )


@dataclass(frozen=True)
class Item:
    """One object: what it is, how it looks, and its straight path (x and y of its centre, in pixels)."""

    noun: str
    shade: str
    size: str
    direction: str
    radius: float
    tilt: float
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
    """The scene of clip ``number`` of a split: its nouns differ from each other.

    No training scene shows the same nouns as any held-out scene, see :func:`is_held_out`.
    """
    options = options or ClipOptions()
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    looks = _random_looks(rng, split, options)
    items = next(filter(None, (_random_paths(rng, looks, options) for _ in range(10_000))), None)
    if items is None:
        raise ValueError(
            f"{len(looks)} objects find no place in clips of {options.width}x{options.height} pixels; "
            "give larger clips or fewer objects"
        )
    step = options.num_frames // options.annotated
    first = int(rng.integers(options.num_frames - step * (options.annotated - 1)))
    annotated = tuple(first + step * i for i in range(options.annotated))
    return Scene(items, annotated, int(rng.integers(2**31)))


def _random_looks(rng: np.random.Generator, split: str, options: ClipOptions) -> list[tuple[str, str, str, str]]:
    """Noun, shade, size and direction of each object."""
    while True:
        count = int(rng.integers(options.min_objects, options.max_objects + 1))
        nouns = rng.permutation(NOUNS)[:count].tolist()
        if is_held_out(nouns) == (split == "heldout"):
            return [(noun, *(str(rng.choice(list(a))) for a in (SHADES, SIZES, DIRECTIONS))) for noun in nouns]


def _random_paths(
    rng: np.random.Generator, looks: list[tuple[str, str, str, str]], options: ClipOptions
) -> tuple[Item, ...] | None:
    """Place objects of these looks; None if one would hide another for much of the clip."""
    items: list[Item] = []
    for noun, shade, size, direction in looks:
        radius, tilt = float(rng.uniform(*SIZES[size])), float(rng.uniform(-14, 14))
        path = _random_path(rng, radius, DIRECTIONS[direction], options)
        new = Item(noun, shade, size, direction, radius, tilt, *path)
        for other in items:
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                if math.dist(new.centre(share), other.centre(share)) < 0.62 * (new.radius + other.radius):
                    return None
        items.append(new)
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
