"""Scenes of the demo's clips: objects, what they do, their sizes, paths and order in depth, drawn from a seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from swim_fast.demo.drawing import SHAPES
from swim_fast.errors import OptionError

NOUNS = tuple(SHAPES)
SIZES = {"small": (19.0, 22.0), "big": (23.0, 26.0)}  # radius in pixels
# What an object does, as its shade in the first and in the second frame of a temporal patch. All objects of a clip do
# something else, so that a clip as a whole tells nothing of one of them: whoever mixes them up guesses.
STATES = {"shines": ("light", "light"), "fades": ("dark", "dark"), "blinks": ("light", "dark")}
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1), "": (0, 0)}
SPLITS = ("train", "heldout")


def is_held_out(nouns: Iterable[str]) -> bool:
    """Tell sets of nouns that only held-out clips show: one in seven sets of three, all pairs being shared.

    Held-out looks of a noun instead would teach the model which answer never comes with it.
    """
    return sum(map(NOUNS.index, nouns)) % len(NOUNS) == 0


@dataclass(frozen=True)
class ClipOptions:
    """Shape of the clips; the defaults suit `swim_fast.demo.tiny_model.ModelSize`.

    `width` and `height` are pixels (even, for H.264); `num_frames` at `fps` frames per second, of which `annotated`
    carry masks. An object is annotated where its visible mask covers the centre of one of the `cell` × `cell` squares,
    the smallest thing that a visual token can point at.

    Raises:
        OptionError: a value out of range.
    """

    width: int = 140
    height: int = 112
    num_frames: int = 4
    fps: int = 2
    annotated: int = 4
    cell: int = 28
    min_objects: int = 3
    max_objects: int = 3
    keyframe_interval: int = 6
    crf: int = 20

    def __post_init__(self) -> None:
        if self.width % 2 or self.height % 2:
            raise OptionError(f"clips of {self.width}x{self.height} pixels: H.264 wants an even width and height")
        least = math.ceil(4 * max(radius for _, radius in SIZES.values()))
        if min(self.width, self.height) < least:
            raise OptionError(
                f"clips of {self.width}x{self.height} pixels: both must be at least {least}, room for objects to move"
            )
        if not 1 <= self.annotated <= self.num_frames:
            raise OptionError(f"annotated is {self.annotated}; it must lie between 1 and num_frames, {self.num_frames}")
        if not 2 <= self.min_objects <= self.max_objects <= len(STATES):
            raise OptionError(
                f"min_objects {self.min_objects} and max_objects {self.max_objects} must be in order and lie between 2 "
                f"and {len(STATES)}: each object does something else"
            )


@dataclass(frozen=True)
class Item:
    """One object: its noun, state, looks, and straight path (x and y of its centre, in pixels)."""

    noun: str
    state: str
    size: str
    direction: str
    radius: float
    tilt: float
    start: tuple[float, float]
    end: tuple[float, float]

    def centre(self, share: float) -> tuple[float, float]:
        """Return its position after this share (0 to 1) of the clip."""
        return tuple(a + (b - a) * share for a, b in zip(self.start, self.end, strict=True))


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn; later items lie in front of earlier ones."""

    items: tuple[Item, ...]
    annotated: tuple[int, ...]
    texture_seed: int

    def turn(self, frame: int) -> int:
        """Return which of the two shades of a state a frame shows; annotated frames take turns."""
        step = self.annotated[1] - self.annotated[0] if len(self.annotated) > 1 else 1
        return (frame - self.annotated[0]) // step % 2


DEFAULTS = ClipOptions()


def random_scene(seed: int, split: str, index: int, options: ClipOptions = DEFAULTS) -> Scene:
    """Return the scene of one clip of a split; its nouns differ from each other.

    No training scene shows the same nouns as any held-out scene, see `is_held_out`.

    Raises:
        OptionError: the objects find no place.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    looks = _random_looks(rng, split, options)
    items = next(filter(None, (_random_paths(rng, looks, options) for _ in range(10_000))), None)
    if items is None:
        raise OptionError(
            f"{len(looks)} objects find no place in clips of {options.width}x{options.height} pixels; "
            "give larger clips or fewer objects"
        )
    step = options.num_frames // options.annotated
    first = int(rng.integers(options.num_frames - step * (options.annotated - 1)))
    annotated = tuple(first + step * i for i in range(options.annotated))
    return Scene(items, annotated, int(rng.integers(2**31)))


def _random_looks(rng: np.random.Generator, split: str, options: ClipOptions) -> list[tuple[str, str, str, str]]:
    """Draw noun, state, size and direction of each object."""
    while True:
        count = int(rng.integers(options.min_objects, options.max_objects + 1))
        nouns = rng.permutation(NOUNS)[:count].tolist()
        if is_held_out(nouns) == (split == "heldout"):
            states = rng.permutation(list(STATES))[:count].tolist()
            return [
                (noun, state, *(str(rng.choice(list(a))) for a in (SIZES, DIRECTIONS)))
                for noun, state in zip(nouns, states, strict=True)
            ]


def _random_paths(
    rng: np.random.Generator, looks: list[tuple[str, str, str, str]], options: ClipOptions
) -> tuple[Item, ...] | None:
    """Place objects of these looks; None if one would hide another for much of the clip."""
    items: list[Item] = []
    for noun, state, size, direction in looks:
        radius, tilt = float(rng.uniform(*SIZES[size])), float(rng.uniform(-14, 14))
        path = _random_path(rng, radius, DIRECTIONS[direction], options)
        new = Item(noun, state, size, direction, radius, tilt, *path)
        for other, share in itertools.product(items, (0.0, 0.25, 0.5, 0.75, 1.0)):
            if math.dist(new.centre(share), other.centre(share)) < 0.62 * (new.radius + other.radius):
                return None
        items.append(new)
    return tuple(items)


def _random_path(
    rng: np.random.Generator, radius: float, direction: tuple[int, int], options: ClipOptions
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Draw start and end of a path along `direction` that stays in the picture."""
    low, high = np.array([radius, radius]), np.array([options.width, options.height]) - radius
    length = float(rng.uniform(0.6, 1.0)) * min(options.width, options.height) * 0.5
    move = length * np.array(direction, dtype=np.float64)
    start = rng.uniform(low - np.minimum(move, 0), high - np.maximum(move, 0))
    return tuple(start.tolist()), tuple((start + move).tolist())
