"""Attention maps over a whole clip, as an H.264 file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from swim_fast.errors import MissingLibraryError
from swim_fast.viz.overlay import overlay_map, resize_frame

# Pixels of the shorter side of a panel: small clips are enlarged so that their captions can be read, large ones made
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
        path: mp4 to write; its folder is made.
        frames: all frames of the clip in order, uint8 [H, W, 3] of one size; panels have their shape, with a shorter
            side of 360 to 720 pixels and even sides, as H.264 wants them.
        maps: [nouns, T, h, w], see `swim_fast.viz.overlay.normalise_map`.
        centres: T ascending frame indices, fractions included, on which the maps are centred.
        labels: one per noun, written into its panel.
        fps: frames per second of the clip.

    Returns:
        The number of frames written.

    Raises:
        MissingLibraryError: PyAV is not installed.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_h264(path, _draw_pictures(frames, maps, centres, labels), fps, {"crf": "18"})


def write_h264(
    path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float, options: Mapping[str, str]
) -> int:
    """Encode uint8 [H, W, 3] frames of one even size as an mp4 with these options of x264; return their number.

    Raises:
        MissingLibraryError: PyAV is not installed.
    """
    av, count = import_av(), 0
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=dict(options))
        for count, frame in enumerate(frames, start=1):
            if count == 1:
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if count:
            container.mux(stream.encode())
    return count


def import_av():
    """Return PyAV, which writes videos.

    Raises:
        MissingLibraryError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        message = f"writing a video needs PyAV, which cannot be imported ({error}): pip install av"
        raise MissingLibraryError(message) from error
    return av


def panel_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of a panel for frames of this size, see `write_heatmap_video`."""
    shorter = min(height, width)
    scale = min(max(shorter, SHORTEST), LONGEST) / shorter
    return 2 * round(height * scale / 2), 2 * round(width * scale / 2)


def patch_weights(frame: float, centres: Sequence[float]) -> np.ndarray:
    """Weight of the map of each temporal patch in a frame, [T], sum 1: linear between the two nearest centres."""
    position = np.interp(frame, centres, np.arange(len(centres)))
    return np.maximum(0, 1 - np.abs(np.arange(len(centres)) - position))


def _draw_pictures(
    frames: Iterable[np.ndarray], maps: np.ndarray, centres: Sequence[float], labels: Sequence[str]
) -> Iterator[np.ndarray]:
    captions: list[np.ndarray] = []
    for index, frame in enumerate(frames):
        height, width = panel_size(*frame.shape[:2])
        captions = captions or [_draw_caption(label, max(12, min(height, width) // 18), width) for label in labels]
        image = resize_frame(frame, height, width)
        panels = []
        for values, caption in zip(np.tensordot(maps, patch_weights(index, centres), (1, 0)), captions, strict=True):
            panels.append(overlay_map(image, values))
            panels[-1][: caption.shape[0], : caption.shape[1]] = caption
        yield np.concatenate(panels, axis=1 if height > width else 0)


def _draw_caption(label: str, size: int, width: int) -> np.ndarray:
    """White letters on black, uint8 [h, w, 3], w at most `width`."""
    from matplotlib import font_manager

    font, margin = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size), size // 3
    _, top, right, bottom = font.getbbox(label)
    image = Image.new("RGB", (min(width, right + 2 * margin), bottom - top + 2 * margin))
    ImageDraw.Draw(image).text((margin, margin - top), label, font=font, fill="white")
    return np.asarray(image)
