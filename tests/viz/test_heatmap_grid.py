"""Heatmaps by value where they have one, and the grid by what is on it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swim_fast.viz import heatmap_grid as heatmaps
from swim_fast.viz.heatmap_grid import HeatmapColumn, heatmap_grid
from swim_fast.viz.overlay import (
    OUTLINE,
    draw_outline,
    normalise_map,
    overlay_map,
    overlay_mask,
    resize_mask,
    upsample_map,
)


def frame(height=48, width=64, value=120):
    return np.full((height, width, 3), value, dtype=np.uint8)


def square(height=48, width=64):
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    return mask


def axes_with_images(figure):
    return [axes for axes in figure.axes if axes.images and not axes.axison]


def test_normalise_map():
    assert normalise_map([[2.0, 4.0], [3.0, 2.0]]).tolist() == [[0, 1], [0.5, 0]]
    assert normalise_map(np.full((2, 3), 7e-9)).tolist() == [[0] * 3] * 2
    tiny = normalise_map(np.array([[1e-30, 3e-30]]))
    assert tiny.tolist() == [[0, 1]] and tiny.dtype == np.float32


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros(3), r"\[h, w\] with cells, got shape \[3\]"),
        (np.zeros((0, 2)), r"\[h, w\] with cells, got shape \[0, 2\]"),
        (np.array([[0, np.nan]]), "NaN or infinite"),
    ],
)
def test_normalise_map_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        normalise_map(values)


def test_upsample_map_is_the_loss_upsampling():
    values = np.random.default_rng(0).random((3, 5)).astype(np.float32)
    values[1, 3] = 1.5
    expected = F.interpolate(torch.tensor(values)[None, None], size=(48, 61), mode="bilinear", align_corners=False)
    assert np.array_equal(upsample_map(values, 48, 61), expected[0, 0].numpy())
    peak = np.unravel_index(upsample_map(values, 45, 75).argmax(), (45, 75))
    assert peak == (15 + 7, 3 * 15 + 7)  # the centre of the greatest cell


def test_overlay_map_colours_where_attention_is():
    values = np.zeros((3, 4))
    values[2, 3] = 5.0
    image = overlay_map(frame(), values)
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    low, high = image[4, 4].astype(int), image[46, 62].astype(int)
    assert np.ptp(low) <= 1 and 0 < low[0] < 120  # a grey frame stays grey where the map is at its minimum, but darker
    assert high[0] > 200 and high[1] > 200  # the yellow end of the colormap
    assert np.array_equal(overlay_map(frame(), values, opacity=0.0)[46, 62], image[4, 4])
    viridis = overlay_map(frame(), values, colormap="viridis", opacity=1.0)
    assert np.abs(viridis[46, 62].astype(int) - (253, 231, 37)).max() <= 1


def test_a_constant_map_shows_no_attention():
    assert np.ptp(overlay_map(frame(), np.full((3, 4), 0.5)), axis=(0, 1)).tolist() == [0, 0, 0]


def test_draw_outline():
    image, mask = frame(), square()
    before = image.copy()
    drawn = draw_outline(image, mask, width=2)
    assert np.array_equal(image, before)  # a copy
    line = (drawn == OUTLINE).all(-1)
    assert not line[mask != 0].any() and np.array_equal(drawn[mask != 0], image[mask != 0])
    assert line[10, 20] and line[11, 20] and not line[9, 20]  # two pixels above the mask's first row, 12
    assert line[20, 14] and line[20, 15] and not line[20, 13]  # and left of its first column, 16
    assert (drawn[9, 20] == 120 // 4).all()  # the dark line around
    assert np.array_equal(drawn[40:], image[40:])
    red = draw_outline(image, mask, colour=(255, 0, 0), width=1)
    assert tuple(red[11, 20]) == (255, 0, 0) and tuple(red[9, 20]) == (120,) * 3


def test_outline_stays_within_the_image():
    full = draw_outline(frame(), np.ones((48, 64)))
    assert np.array_equal(full, frame())
    assert np.array_equal(draw_outline(frame(), np.zeros((48, 64))), frame())
    corner = np.zeros((48, 64))
    corner[:5, :5] = 1
    line = (draw_outline(frame(), corner, width=1) == OUTLINE).all(-1)
    assert line[5, 0] and line[0, 5] and not line[47].any() and not line[:, 63].any()


def test_overlay_mask_keeps_the_object_and_dims_the_rest():
    image = overlay_mask(frame(), square())
    assert tuple(image[18, 24]) == (120,) * 3
    assert tuple(image[40, 60]) == (78,) * 3
    assert (image == OUTLINE).all(-1).any()


def test_resize_mask():
    mask = np.array([[0, 255], [1, 0]])
    assert resize_mask(mask, 4, 4).astype(int).tolist() == [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    fine = np.zeros((9, 9), dtype=bool)
    fine[4, 4] = True
    assert resize_mask(fine, 3, 3)[1, 1] and resize_mask(fine, 3, 3).sum() == 1
    with pytest.raises(ValueError, match=r"\[Hm, Wm\] with pixels, got shape \[4\]"):
        resize_mask(np.zeros(4), 2, 2)


def columns():
    hit, miss = np.zeros((4, 4)), np.zeros((3, 4))
    hit[1, 1], miss[2, 3] = 1.0, 1.0
    return [
        HeatmapColumn(frame(), square(), [hit, miss], "frame 0"),
        HeatmapColumn(frame(90, 64), None, [hit, None], "frame 8"),
        HeatmapColumn(frame(), square(24, 32), [None, np.ones((3, 4))], ""),
    ]


def test_grid_holds_every_panel(tmp_path):
    path = tmp_path / "new" / "folder" / "grid.png"
    figure = heatmap_grid(columns(), path, title="What does the $red$ disc do? disc", map_labels=("with", "without"))
    panels = axes_with_images(figure)
    assert len(panels) == 9
    texts = [text.get_text() for text in figure.texts]
    for expected in ("What does the $red$ disc do? disc", "frame 0", "frame 8", "mask", "with", "without"):
        assert expected in texts
    # Column by column, top to bottom; each panel as wide as its frame asks, all of one height, none overlapping.
    boxes = [axes.get_position() for axes in panels]
    inches = figure.get_size_inches()
    for box, (height, width) in zip(boxes, [(48, 64)] * 3 + [(90, 64)] * 3 + [(48, 64)] * 3, strict=True):
        assert box.width * inches[0] / (box.height * inches[1]) == pytest.approx(width / height, rel=0.01)
        assert box.height == pytest.approx(boxes[0].height)
        assert 0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 < 1
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
    # What is on them: the mask row, both maps, a plain frame where there is neither.
    images = [axes.images[0].get_array() for axes in panels]
    assert all(image.shape[0] == heatmaps.PANEL_PIXELS for image in images)
    assert (images[0] == OUTLINE).all(-1).any() and (images[1] == OUTLINE).all(-1).any()
    assert not np.array_equal(images[1], images[2])
    assert np.array_equal(images[3], images[5]) and np.ptp(images[3]) == 0
    assert not (images[4] == OUTLINE).all(-1).any() and np.ptp(images[4]) > 0
    # The peak is marked where there is a map with a peak and a mask to compare it with: a ring inside, a cross outside.
    marked = [bool(axes.collections) for axes in panels]
    assert marked == [False, True, True, False, False, False, False, False, False]
    ring, cross = (panels[i].collections[-1] for i in (1, 2))
    assert ring.get_offsets()[0].tolist() == pytest.approx([1.5 * images[1].shape[1] / 4 - 0.5, 1.5 * 256 / 4 - 0.5])
    assert cross.get_offsets()[0].tolist() == pytest.approx([3.5 * images[2].shape[1] / 4 - 0.5, 2.5 * 256 / 3 - 0.5])
    assert len(ring.get_paths()[0]) > 8 and len(cross.get_paths()[0]) == 4
    assert heatmaps.LEGEND in texts
    written = path.read_bytes()
    assert written.startswith(b"\x89PNG") and len(written) > 5000


def test_grid_without_maps_title_or_path():
    figure = heatmap_grid([HeatmapColumn(frame(), square(), [])], map_labels=())
    assert len(axes_with_images(figure)) == len(figure.axes) == 1
    assert [text.get_text() for text in figure.texts if text.get_text()] == ["mask"]


def test_grid_goes_on_below():
    figure = heatmap_grid(columns(), map_labels=("with", "without"), per_line=2)
    panels = axes_with_images(figure)
    assert len(panels) == 9
    boxes = [axes.get_position() for axes in panels]
    inches = figure.get_size_inches()
    for i, one in enumerate(boxes):
        assert 0 < one.x0 < one.x1 < 1 and 0 < one.y0 < one.y1 < 1
        assert one.height * inches[1] == pytest.approx(heatmaps.PANEL_PIXELS / heatmaps.DPI)
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
    assert boxes[6].x0 == pytest.approx(boxes[0].x0) and boxes[6].y1 < boxes[2].y0
    texts = [text.get_text() for text in figure.texts]
    assert [texts.count(label) for label in ("mask", "with", "without", "frame 8")] == [2, 2, 2, 1]


def test_long_titles_are_wrapped():
    title = "Why does the small grey dog on the left of the picture look into the camera for so long? dog"
    figure = heatmap_grid([HeatmapColumn(frame(), square(), [np.eye(3)])], title=title)
    figure.canvas.draw()
    lines = [text for text in figure.texts if text.get_text() and text.get_text() in title]
    assert " ".join(line.get_text() for line in lines) == title and len(lines) > 1
    width = figure.bbox.width
    assert all(0 <= line.get_window_extent().x0 and line.get_window_extent().x1 <= width for line in lines)


@pytest.mark.parametrize(
    "column, message",
    [
        (HeatmapColumn(frame(), None, []), r"column 1 has 0 maps, map_labels names 1"),
        (HeatmapColumn(frame().astype(float), None, [None], "frame 3"), r"column 1 \(frame 3\): a frame must be uint8"),
        (HeatmapColumn(frame(), np.zeros(3), [None]), r"column 1 \(no label\): a mask must be \[Hm, Wm\]"),
        (HeatmapColumn(frame(), None, [np.zeros(3)]), r"column 1 \(no label\): a map must be \[h, w\]"),
    ],
)
def test_grid_names_the_bad_column(column, message):
    with pytest.raises(ValueError, match=message):
        heatmap_grid([HeatmapColumn(frame(), None, [None]), column])


def test_grid_refuses_no_column():
    with pytest.raises(ValueError, match="at least one column"):
        heatmap_grid([])


def test_matplotlib_is_imported_late_and_pyplot_never():
    code = (
        "import sys, numpy as np\n"
        "from swim_fast.viz.heatmap_grid import HeatmapColumn, heatmap_grid\n"
        "assert 'matplotlib' not in sys.modules\n"
        "heatmap_grid([HeatmapColumn(np.zeros((8, 8, 3), np.uint8), None, [np.eye(2)])])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
