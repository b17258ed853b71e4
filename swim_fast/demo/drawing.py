"""Anti-aliased drawing of the demo's objects and backgrounds.

Everything is drawn `SUPERSAMPLING` times too large with hard edges and then averaged down, so that the share of a pixel
that an object covers is known exactly: the masks come from the same sub-pixels as the colours.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4

# Every noun has a hue of its own and two shades of it.
COLOURS = {
    "ball": (46, 116, 236),
    "box": (52, 168, 92),
    "star": (248, 204, 56),
    "heart": (226, 52, 66),
    "moon": (60, 206, 214),
    "flower": (164, 84, 214),
    "cone": (244, 130, 36),
}
SHADES = {"light": 0.45, "dark": -0.5}

# Points of a shape lie in the unit disc, y downwards.
Points = list[tuple[float, float]]


def _angles(corners: int) -> list[float]:
    return [2 * math.pi * i / corners for i in range(corners)]


def _disc(radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> Points:
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in _angles(72)]


def _box(half_width: float, top: float, bottom: float) -> Points:
    return [(-half_width, top), (half_width, top), (half_width, bottom), (-half_width, bottom)]


def _star() -> Points:
    return [(r * math.sin(a), -r * math.cos(a) + 0.05) for a, r in zip(_angles(10), [1.0, 0.5] * 5, strict=True)]


def _heart() -> Points:
    def height(a: float) -> float:
        return 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)

    return [(16 * math.sin(a) ** 3 / 16.5, (-height(a) - 2.5) / 16.5) for a in _angles(72)]


def _moon() -> Points:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.23 * math.pi, 1.77 * math.pi, 48)]
    (x, y), bulge = outer[0], -0.2
    centre = (x * x + y * y - bulge * bulge) / (2 * (x - bulge))  # circle through both horns and (bulge, 0)
    start = math.atan2(y, x - centre)
    inner = np.linspace(-start, -2 * math.pi + start, 48)
    return outer + [(centre + (centre - bulge) * math.cos(a), (centre - bulge) * math.sin(a)) for a in inner]


def _flower() -> Points:
    petals = [(a, 0.58 + 0.42 * abs(math.cos(2.5 * a))) for a in _angles(120)]  # five round ones
    return [(r * math.sin(a), -r * math.cos(a)) for a, r in petals]


# noun: outline, and patches of a lighter (+) or darker (−) shade of the object's colour
SHAPES: dict[str, tuple[Points, list[tuple[Points, float]]]] = {
    "ball": (_disc(), [(_box(1.0, -0.22, 0.22), -0.35), (_disc(0.2, -0.4, -0.5), 0.6)]),
    "box": (_box(0.85, -0.8, 0.8), [(_box(0.85, -0.8, -0.38), 0.3), (_box(0.17, -0.8, 0.8), -0.4)]),
    "star": (_star(), [(_disc(0.24), 0.35)]),
    "cone": (
        [(-0.13, -1), (0.13, -1), (0.6, 0.58), (0.92, 0.58), (0.92, 0.88), (-0.92, 0.88), (-0.92, 0.58), (-0.6, 0.58)],
        [
            ([(-0.28, -0.48), (0.28, -0.48), (0.38, -0.14), (-0.38, -0.14)], 0.6),
            ([(-0.48, 0.18), (0.48, 0.18), (0.56, 0.44), (-0.56, 0.44)], 0.6),
        ],
    ),
    "heart": (_heart(), [(_disc(0.17, -0.45, -0.4), 0.6)]),
    "moon": (_moon(), [(_disc(0.12, -0.62, -0.25), -0.25), (_disc(0.15, -0.45, 0.42), -0.25)]),
    "flower": (_flower(), [(_disc(0.32), -0.5)]),
}


def _shade(colour: np.ndarray, amount: float) -> np.ndarray:
    """Mix [..., 3] colours with white (amount > 0) or black (< 0)."""
    return colour + (255.0 - colour) * amount if amount >= 0 else colour * (1.0 + amount)


def sprite(noun: str, shade: str, radius: float, tilt: float) -> tuple[Image.Image, Image.Image]:
    """Draw one object, `SUPERSAMPLING` times enlarged.

    Args:
        noun: a key of `SHAPES`.
        shade: a key of `SHADES`.
        radius: of the disc around the object, in pixels of the clip.
        tilt: rotation in degrees, clockwise.

    Returns:
        Picture (RGB) and silhouette (L: 0 or 255), both square with the object's centre in the middle.
    """
    outline, patches = SHAPES[noun]
    scale = radius * SUPERSAMPLING
    half = math.ceil(scale) + SUPERSAMPLING
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def placed(points: Points) -> Points:
        return [(half + scale * (x * cos - y * sin), half + scale * (x * sin + y * cos)) for x, y in points]

    def region(points: Points) -> Image.Image:
        picture = Image.new("L", (2 * half, 2 * half))
        ImageDraw.Draw(picture).polygon(placed(points), fill=255)
        return picture

    # Light falls from above on the left.
    y, x = np.mgrid[-1 : 1 : 2j * half, -1 : 1 : 2j * half]
    base = _shade(np.array(COLOURS[noun], dtype=np.float64), SHADES[shade])
    light = 1.0 - 0.16 * (x + y)[..., None]
    pixels = base * light
    for points, amount in patches:
        inside = np.asarray(region(points)) > 0
        pixels[inside] = _shade(base, amount) * light[inside]
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    edge = tuple(int(c) for c in _shade(base, -0.55))
    width = max(SUPERSAMPLING, round(0.09 * scale))
    closed = placed([*outline, *outline[:2]])
    ImageDraw.Draw(picture).line(closed, fill=edge, width=width, joint="curve")
    return picture, region(outline)


def background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Draw a muted background of a gradient, a faint pattern and cloudy noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    hue = rng.uniform(-1, 1, size=3)
    base = rng.uniform(84, 172) + 9 * (hue - hue.mean())
    pixels = np.broadcast_to(base, (height, width, 3)).copy()
    angle = rng.uniform(0, 2 * math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle)) / max(width, height)
    pixels += rng.uniform(10, 34) * along[..., None]

    period, angle = rng.uniform(9, 22), rng.uniform(0, math.pi)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    waves = np.sin(2 * math.pi * u / period), np.sin(2 * math.pi * v / period)
    pattern = rng.choice(["stripes", "checks", "dots", "plain"])
    if pattern == "stripes":
        pixels += 7 * np.sign(waves[0])[..., None]
    elif pattern == "checks":
        pixels += 7 * np.sign(waves[0] * waves[1])[..., None]
    elif pattern == "dots":
        pixels += 14 * (waves[0] + waves[1] > 1.1)[..., None]

    for cells, strength in ((5, 12.0), (14, 7.0), (40, 4.0)):
        noise = rng.uniform(-1, 1, size=(cells, cells)).astype(np.float32)
        cloud = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        pixels += strength * np.asarray(cloud, dtype=np.float64)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
