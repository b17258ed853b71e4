import json
import time

import numpy as np
import pytest
from pycocotools import mask as coco

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import MAX_PIXELS, decode_segmentation, read_segmentation, union


def _blobs(height, width, seed, count=4):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(count):
        y, x, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(1, 0.4 * min(height, width) + 1)
        mask |= (rows - y) ** 2 + (columns - x) ** 2 < r**2
    return mask.astype(np.uint8)


def _rle(mask):
    code = coco.encode(np.asfortranarray(mask))
    return {"size": list(map(int, code["size"])), "counts": code["counts"].decode()}


def _runs(mask):
    flat = np.concatenate(([0], mask.T.ravel()))
    changes = np.flatnonzero(np.diff(flat)).tolist()
    return np.diff([0, *changes, mask.size]).tolist()


SHAPES = [(1, 1), (5, 3), (48, 64), (101, 67), (720, 1280)]
MASKS = [np.ones(shape, np.uint8) for shape in SHAPES]
MASKS += [_blobs(*shape, seed) for seed, shape in enumerate(SHAPES[1:])]
MASKS += [np.random.default_rng(7).integers(0, 2, (37, 91), np.uint8), np.eye(30, dtype=np.uint8)]


def _check(segmentation, mask, **kwargs):
    result = decode_segmentation(segmentation, *mask.shape, **kwargs)
    np.testing.assert_array_equal(result, mask)
    assert result.dtype == np.uint8 and result.flags.c_contiguous and result.flags.writeable


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.shape[0]}x{mask.shape[1]}-{mask.sum()}")
def test_run_length_codes_as_pycocotools_writes_them(mask):
    code = _rle(mask)
    _check(code, mask)
    _check(json.loads(json.dumps(code)), mask)  # backslashes survive JSON
    _check({**code, "counts": code["counts"].encode()}, mask)
    _check({"counts": code["counts"]}, mask)  # size absent: the frame's
    _check({"segmentation": code}, mask)
    _check({"segmentation": {"segmentation": code}}, mask)
    _check({"size": list(mask.shape), "counts": _runs(mask)}, mask)
    _check({"counts": _runs(mask), "size": None}, mask)


def test_differences_between_runs_may_be_negative_and_of_many_digits():
    mask = np.zeros((2000, 3000), np.uint8)
    mask[:, 5:2900] = 1
    mask[1::2, 2950] = 1
    _check(_rle(mask), mask)


@pytest.mark.parametrize(
    "nothing", [None, {}, [], "", {"segmentation": None}, {"segmentation": {}}, {"size": [4, 6], "counts": ""},
                {"size": [4, 6], "counts": []}, {"size": [4, 6], "counts": None}, {"size": [4, 6]},
                {"size": [4, 6], "counts": [24]}, {"counts": [24]}]
)  # fmt: skip
def test_nothing_marked_is_none(nothing):
    assert decode_segmentation(nothing, 4, 6) is None


def test_polygons_as_pycocotools_draws_them():
    triangle, square = [10.5, 5, 40, 8.25, 22, 30], [50, 20, 60, 20, 60, 44.5, 50, 44.5]
    expected = coco.decode(coco.merge(coco.frPyObjects([triangle, square], 48, 64)))
    assert 400 < expected.sum() < 1000
    _check([triangle, square], expected)
    _check({"segmentation": [triangle, square]}, expected)


def test_a_polygon_that_covers_the_frame():
    _check([[0, 0, 64, 0, 64, 48, 0, 48]], np.ones((48, 64), np.uint8))


@pytest.mark.parametrize(
    "size, frame",
    [((360, 640), (720, 1280)), ((1080, 1920), (480, 854)), ((480, 853), (720, 1280)), ((720, 1280), (360, 640)),
     ((719, 1280), (720, 1280)), ((240, 427), (1080, 1920))],
)  # fmt: skip
def test_masks_of_a_resized_copy_fit(size, frame):
    mask = _blobs(*size, 3)
    np.testing.assert_array_equal(decode_segmentation(_rle(mask), *frame), mask)


@pytest.mark.parametrize(
    "size, frame", [((720, 1280), (480, 640)), ((1080, 1920), (1088, 1920)), ((100, 100), (99, 90))]
)
def test_masks_of_another_shape_do_not_fit(size, frame):
    with pytest.raises(DataError) as caught:
        decode_segmentation(_rle(_blobs(*size, 3)), *frame)
    message = "mask size {} x {} does not fit the video's {} x {} (height x width), nor its aspect ratio"
    assert message.format(*size, *frame) in str(caught.value) and "is it meant for another video?" in str(caught.value)


def test_exchanged_height_and_width_are_pointed_out():
    with pytest.raises(DataError, match=r"does not fit .* height and width look exchanged: size is \[height, width\]"):
        decode_segmentation(_rle(_blobs(1280, 720, 3)), 720, 1280)


SIZES = [[48], [48, 64, 3], [0, 64], [-48, -64], [48.0, 64.0], "48x64", {"h": 48}, [True, True]]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_is_none(size):
    with pytest.raises(DataError, match=r"mask size .* is not \[height, width\] in pixels"):
        decode_segmentation({"size": size, "counts": [10, 48 * 64 - 10]}, 48, 64)


def test_damaged_run_length_codes():
    mask = _blobs(48, 64, 5)
    code = _rle(mask)
    counts, runs = code["counts"], _runs(mask)
    assert len(counts) > 30

    def fails(counts, message, size=(48, 64)):
        with pytest.raises(DataError, match="run-length code does not decode: " + message):
            decode_segmentation({"size": list(size), "counts": counts}, *size)

    fails(counts[:-9], r"(its runs cover \d+ pixels, its size 48 x 64 \(height x width\) has 3072|it ends inside)")
    fails(counts + counts[-5:], "")
    fails(counts, r"its runs cover 3072 pixels, its size 96 x 128", size=(96, 128))
    fails(counts[:10] + " " + counts[10:], "character ' ' at position 10 does not occur in such codes")
    fails(counts[:4] + "~" + counts[4:], "character '~' at position 4 does not .*; were backslashes lost")
    fails("ü" + counts, "it holds non-ASCII characters")
    fails("o" * 20, "it ends inside a number; it was cut off")
    fails("o" * 20 + "0", "it holds a number of more than 40 bits")
    fails("N" + counts, "")
    fails(runs[:-1], r"its runs cover \d+ pixels")
    fails([*runs, 5], r"its runs cover 3077 pixels")
    fails([-5, 3077], "it holds a negative run")
    fails([2**62] * 8, "its runs cover")
    fails([10.5, 3061.5], "counts holds something else than whole numbers")
    fails([True, 3071], "counts holds something else than whole numbers")
    fails(["10", 3062], "counts holds something else than whole numbers")
    fails(3072, "counts is a int, not a string or list")


def test_one_changed_character_is_noticed():
    """Of a compressed code's characters nearly any change moves the sum of the runs."""
    mask = _blobs(48, 64, 5)
    counts = _rle(mask)["counts"]
    unnoticed = 0
    for place in range(len(counts)):
        changed = counts[:place] + chr(48 + (ord(counts[place]) - 48 ^ 1)) + counts[place + 1 :]
        try:
            result = decode_segmentation({"size": [48, 64], "counts": changed}, 48, 64)
        except DataError:
            continue
        unnoticed += 1
        assert result.shape == (48, 64) and set(np.unique(result)) <= {0, 1}
    assert unnoticed <= len(counts) // 10


@pytest.mark.parametrize(
    "polygons, message",
    [
        ([[10, 10, 20, 20]], "polygon 0 has 4 coordinates; it needs x and y of at least three points"),
        ([[1, 1, 9, 1, 9, 9], [10, 10, 20, 20, 5, 8, 9]], "polygon 1 has 7 coordinates"),
        ([[]], "polygon 0 has 0 coordinates"),
        ([[10, 10, 20, 20, 70, 30]], "polygon 0 leaves the frame: x 10 to 70, y 10 to 30, .* 64 wide and 48 high"),
        ([[10, 10, 20, 50, 30, 30]], "leaves the frame"),
        ([[-5, 10, 20, 40, 30, 30]], "leaves the frame: x -5 to 30"),
        ([[float("nan"), 10, 20, 40, 30, 30]], "leaves the frame"),
        ([10, 10, 20, 20, 30, 30], r"polygon 0 is not a flat list of coordinates \[x0, y0, x1, y1, …\]"),
        ([[[10, 10], [20, 20], [30, 5]]], "polygon 0 is not a flat list of coordinates"),
        ([["10", "10", "20", "20", "30", "5"]], "polygon 0 is not a flat list of coordinates"),
    ],
)
def test_malformed_polygons(polygons, message):
    with pytest.raises(DataError, match=message):
        decode_segmentation(polygons, 48, 64)


@pytest.mark.parametrize("thing", ["<RLE>", 5, 1.5, True])
def test_something_else_altogether(thing):
    with pytest.raises(DataError, match=f"the segmentation is a {type(thing).__name__}; expected a COCO run-length"):
        decode_segmentation(thing, 48, 64)


def test_union():
    a, b = _blobs(30, 40, 1, 1), _blobs(30, 40, 2, 1)
    assert (a & ~b).any() and (b & ~a & 1).any()
    result = union([a, None, b])
    np.testing.assert_array_equal(result, a | b)
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    np.testing.assert_array_equal(union([a]), a)
    assert union([]) is None and union([None, None]) is None
    with pytest.raises(DataError, match=r"differ in size: \(15, 20\) and \(30, 40\); annotate them all at one size"):
        union([a, _blobs(15, 20, 1)])


@pytest.mark.parametrize("seed", range(8))
def test_the_union_of_polygons_is_that_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    polygons = [(rng.uniform(-1, 1, (rng.integers(3, 9), 2)) * 12 + rng.uniform(0, 60, 2)) for _ in range(9)]
    polygons = [np.clip(points, -1, (65, 49)).ravel().tolist() for points in polygons]
    expected = coco.decode(coco.merge(coco.frPyObjects(polygons, 48, 64)))
    np.testing.assert_array_equal(decode_segmentation(polygons, 48, 64), expected)
    assert read_segmentation(polygons, 48, 64).area == expected.mean()


def test_polygons_are_drawn_at_the_size_that_is_stated():
    """On a frame twice as large they would cover a quarter of the object."""
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    expected = decode_segmentation(square, 48, 64)
    for given in (
        read_segmentation(square, 96, 128, drawn_on=(48, 64)),
        read_segmentation({"segmentation": square, "height": 48, "width": 64}, 96, 128),
        read_segmentation({"counts": _runs(expected)}, 96, 128, drawn_on=(48, 64)),
    ):
        np.testing.assert_array_equal(given.decode(), expected)
    with pytest.raises(DataError, match="mask size 48 x 48 does not fit the video's 96 x 128"):
        read_segmentation(square, 96, 128, drawn_on=(48, 48))
    with pytest.raises(DataError, match="height '48' and width 64 are no size in pixels"):
        read_segmentation({"segmentation": square, "height": "48", "width": 64}, 96, 128)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"bbox": [1, 2, 3, 4]}, "holds no segmentation but 'bbox'; a box is no mask"),
        ({"segmentation": None, "bbox": [1, 2, 3, 4]}, "has a bbox but no mask; give its segmentation"),
        ({"segmentaton": {"counts": [3]}}, "holds no segmentation but 'segmentaton'; did you mean 'segmentation'?"),
        ({"size": [48, 64], "count": "04"}, "holds no segmentation but 'count'; did you mean 'counts'?"),
        ({"mask": {"counts": [3]}}, "but 'mask'; give {\"segmentation\": …}, or null where there is no mask"),
        ([[0.1, 0.1, 0.9, 0.1, 0.5, 1.0]], "are at most 1: .* fractions of the frame; multiply them .* 64 and 48"),
    ],
)
def test_what_is_no_mask_is_refused_with_its_remedy(segmentation, message):
    with pytest.raises(DataError, match=message):
        read_segmentation(segmentation, 48, 64)


HUGE = 10**3_000
ZIGZAG = [0, 0, 64, 48] * 20_000


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [HUGE, HUGE], "counts": [HUGE]}, "mask size .* is not"),
        ({"size": [480_000, 640_000], "counts": [480_000 * 640_000]}, "has more than 67,108,864 pixels"),
        ({"size": [48, 64], "counts": [HUGE]}, "a number of more than 64 bits"),
        ({"size": [48, 64], "counts": [0, 2**62, 2**62, 2**62, 2**62, 48 * 64]}, "its runs cover"),
        ({"size": [48, 64], "counts": "oooooooo0" * 2_000}, "more than 40 bits"),
        ([[1, 1, HUGE, 1, 1, 9]], "a coordinate has more than 300 digits"),
        ([[1, 1, 1e308, 1, 1, 9]], "leaves the frame: x 1 to 1e\\+308"),
        ([[1, 1, float("inf"), 1, 1, 9]], "leaves the frame"),
        ([ZIGZAG], "outline is 2,6.*,... pixels long, more than 1,048,576"),
        ([[5, 5] * 1_200_000], "pixels long, more than"),
        ([[5, 5, 9, 5, 9, 9]] * 10_001, "10,001 polygons in one mask"),
        ({"".join("ab" * 500_000): 1}, "holds no segmentation but"),
    ],
    ids=range(12),
)
def test_masks_beyond_all_bounds_are_refused_at_once(segmentation, message):
    begin = time.process_time()
    with pytest.raises(DataError, match=message) as caught:
        read_segmentation(segmentation, 48, 64)
    assert time.process_time() - begin < 2 and len(str(caught.value)) < 500


def test_the_largest_masks_are_read():
    side = int(MAX_PIXELS**0.5)
    assert read_segmentation({"size": [side, side], "counts": [side, side * (side - 1)]}, 48, 48).area > 0.99
    assert read_segmentation([[0, 0, 64, 0, 64, 48]] * 5_000, 48, 64).area > 0.4
