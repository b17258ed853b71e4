"""Attention maps over a whole clip, as an H.264 file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from swim_fast.viz.heatmap_grid import overlay_map

# Pixels of a panel's shorter side: small clips are enlarged so that their captions can be read, large ones made
# smaller because each frame is coloured on the CPU.
SHORTEST, LONGEST = 360, 720


def write_heatmap_video(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    maps: np.ndarray,
    centres: Sequence[float],
    labels: Sequence[str],
    fps: float,
) -> int:
    """Write a clip with the maps over it: one panel per noun, one below the other, or side by side in portrait clips.

    Between the middles of two temporal patches their maps are cross-faded, before the first and after the last they
    stay: steps from one patch to the next distract from what the frames show.

    Args:
        path: file to write, mp4; its folder is made.
        frames: all frames of the clip in order, uint8 [H, W, 3] of one size; panels have their shape, with a shorter
            side of 360 to 720 pixels and even sides, as H.264 wants them.
        maps: [nouns, T, h, w], see `swim_fast.viz.heatmap_grid.normalise_map`.
        centres: T ascending frame numbers, fractions included, on which the maps are centred.
        labels: one per noun, written into its panel.
        fps: frames per second of the clip.

    Returns:
        The number of frames written.

    Raises:
        ImportError: PyAV is not installed.
    """
    av = import_av()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    panels: list[_Panel] = []
    count, stream = 0, None
    with av.open(os.fspath(path), "w", format="mp4") as container:
        for number, frame in enumerate(frames):
            if stream is None:
                height, width = panel_size(*frame.shape[:2])
                panels = [_Panel(label, height, width) for label in labels]
                rate = Fraction(fps).limit_denominator(1001)
                stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
                axis = 1 if height > width else 0
                stream.height, stream.width = (height, width * len(labels)) if axis else (height * len(labels), width)
                stream.pix_fmt = "yuv420p"
            image = _resized(frame, height, width)
            weights = patch_weights(number, centres)
            faded = np.tensordot(maps, weights, (1, 0))  # [nouns, h, w]
            drawn = [panel(image, values) for panel, values in zip(panels, faded, strict=True)]
            picture = av.VideoFrame.from_ndarray(np.concatenate(drawn, axis=axis), format="rgb24")
            container.mux(stream.encode(picture))
            count += 1
        if stream is not None:
            container.mux(stream.encode())
    return count


def import_av():
    """PyAV, which writes videos; ImportError with the remedy where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"writing a video needs PyAV, which cannot be imported ({error}): pip install av") from error
    return av


def panel_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of a panel for frames of this size, see `write_heatmap_video`."""
    shorter = min(height, width)
    scale = min(max(shorter, SHORTEST), LONGEST) / shorter
    return 2 * round(height * scale / 2), 2 * round(width * scale / 2)


def patch_weights(frame: float, centres: Sequence[float]) -> np.ndarray:
    """How much of each temporal patch's map a frame shows, [T], sum 1: linear between the two nearest centres."""
    place = np.interp(frame, centres, np.arange(len(centres)))
    return np.maximum(0, 1 - np.abs(np.arange(len(centres)) - place))


class _Panel:
    """Draws one noun's map and caption over frames of one size."""

    def __init__(self, label: str, height: int, width: int):
        self._caption = _caption(label, size=max(12, min(height, width) // 18), width=width)

    def __call__(self, image: np.ndarray, values: np.ndarray) -> np.ndarray:
        picture = overlay_map(image, values)
        height, width = self._caption.shape[:2]
        picture[:height, :width] = self._caption
        return picture


def _caption(label: str, size: int, width: int) -> np.ndarray:
    """White letters on black, uint8 [h, w, 3], w at most ``width``."""
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
    margin = size // 3
    _, top, right, bottom = font.getbbox(label)
    image = Image.new("RGB", (min(width, right + 2 * margin), bottom - top + 2 * margin))
    ImageDraw.Draw(image).text((margin, margin - top), label, font=font, fill="white")
    return np.asarray(image)


def _resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
