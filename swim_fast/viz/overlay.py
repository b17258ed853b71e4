"""The two drawings that all pictures share: the colours of a map over a frame, and a line around a mask.

Arrays are numpy: frames uint8 [H, W, 3] RGB, masks [Hm, Wm] of any dtype and size (non-zero is the object), maps [h, w]
with one number per visual token, in any unit, such as `p` of `swim_fast.loss.mask_loss.GridPredictions`. The colours
of a map run from its own minimum to its own maximum, as the loss sees it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from swim_fast.errors import UserError

COLORMAP = "inferno"  # perceptually uniform, and black at 0: what gets no attention stays dark
OUTLINE = (64, 224, 255)  # not in the colormap


class PictureError(UserError, ValueError):
    """Arrays that cannot be drawn."""


def check_frame(frame: np.ndarray) -> np.ndarray:
    """Return the frame as an array.

    Raises:
        PictureError: not uint8 [H, W, 3].
    """
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise PictureError(f"a frame must be uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    return frame


def normalise_map(values: np.ndarray) -> np.ndarray:
    """Min-max to [0, 1], fp32, same shape; a constant map becomes 0.

    Raises:
        PictureError: not [h, w], empty, or not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise PictureError(f"a map must be [h, w] with cells, got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise PictureError("a map holds NaN or infinite values: look at the run that made it")
    spread = values.max() - values.min()
    return ((values - values.min()) / (spread or 1.0)).astype(np.float32)


def upsample_map(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w] to fp32 [height, width], bilinear with half-pixel centres: the loss's own upsampling."""
    import torch  # here, so that the processes that render the demo start without it

    cells = torch.from_numpy(np.array(values, dtype=np.float32))[None, None]
    return torch.nn.functional.interpolate(cells, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def resize_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] to [height, width, 3]."""
    return np.asarray(Image.fromarray(check_frame(frame)).resize((width, height), Image.Resampling.BICUBIC))


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """[Hm, Wm] to bool [height, width], by the nearest pixel centre.

    Raises:
        PictureError: not [Hm, Wm], or empty.
    """
    mask = np.asarray(mask) != 0
    if mask.ndim != 2 or mask.size == 0:
        raise PictureError(f"a mask must be [Hm, Wm] with pixels, got shape {list(mask.shape)}")
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def overlay_map(
    frame: np.ndarray, values: np.ndarray, *, colormap: str = COLORMAP, opacity: float = 0.85
) -> np.ndarray:
    """Lay the colours of a map over a frame.

    The frame loses most of its own colour, so that hue means attention only; the higher the attention, the more of the
    colormap covers it.

    Args:
        frame: uint8 [H, W, 3].
        values: [h, w], see `normalise_map`.
        colormap: name of a matplotlib colormap.
        opacity: of the colour at the maximum of the map, in [0, 1].

    Returns:
        uint8 [H, W, 3].
    """
    from matplotlib import colormaps

    frame = check_frame(frame)
    strength = upsample_map(normalise_map(values), *frame.shape[:2])[..., None]
    colour = colormaps[colormap](strength[..., 0])[..., :3] * 255
    grey = frame @ np.array([0.299, 0.587, 0.114])
    muted = 0.6 * (0.35 * frame + 0.65 * grey[..., None])
    alpha = opacity * np.sqrt(strength)
    return np.rint(muted * (1 - alpha) + colour * alpha).clip(0, 255).astype(np.uint8)


def draw_outline(
    image: np.ndarray, mask: np.ndarray, *, colour: tuple[int, int, int] = OUTLINE, width: int | None = None
) -> np.ndarray:
    """Draw a line around a mask, and a thin dark one around that, to be seen on any background.

    Args:
        image: uint8 [H, W, 3].
        mask: [Hm, Wm], brought to the size of the image.
        colour: RGB, 0 to 255.
        width: in pixels; by default 1/100 of the shorter side, at least 1.

    Returns:
        uint8 [H, W, 3], a copy. The line runs just outside of the mask, and not where the mask touches the border.
    """
    image = check_frame(image).copy()
    inside = resize_mask(mask, *image.shape[:2])
    width = width or max(1, round(min(image.shape[:2]) / 100))
    line = _dilate(inside, width)
    halo = _dilate(line, max(1, width // 2)) & ~line
    image[halo] //= 4
    image[line & ~inside] = colour
    return image


def overlay_mask(frame: np.ndarray, mask: np.ndarray, *, colour: tuple[int, int, int] = OUTLINE) -> np.ndarray:
    """Dim the frame outside of the mask, and outline the mask; the object keeps its own colours. uint8 [H, W, 3]."""
    inside = resize_mask(mask, *check_frame(frame).shape[:2])[..., None]
    return draw_outline(np.where(inside, frame, np.rint(0.65 * frame).astype(np.uint8)), mask, colour=colour)


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Grow a bool [H, W] mask by `radius` pixels in all directions."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * radius + 1))) > 0
