import numpy as np
import pytest

from swim_fast.data.sample.sampling import (
    choose_frames,
    count_frames,
    fit_pixels,
    plan_frames,
    supervised_patches,
)
from swim_fast.data.source.errors import DataError
from swim_fast.data.video.reader import MediaInfo
from swim_fast.families.sizes import PixelLimits
from swim_fast.options import Sampling


@pytest.mark.parametrize("seed", range(200))
def test_choice_keeps_its_promises(seed):
    rng = np.random.default_rng(seed)
    num_frames, max_frames = int(rng.integers(1, 120)), int(rng.integers(2, 40))
    annotated = set(rng.integers(0, num_frames, rng.integers(0, 30)).tolist())
    frames = choose_frames(num_frames, rng.permutation(list(annotated)).astype(int).tolist(), max_frames)
    limit = max_frames - max_frames % 2
    assert all(type(frame) is int for frame in frames)
    assert len(frames) % 2 == 0 and frames == sorted(frames)
    distinct = sorted(set(frames))
    assert frames in (distinct, distinct + distinct[-1:]), "only the last frame may be repeated"
    assert len(distinct) == min(limit, num_frames)
    assert set(frames) <= set(range(num_frames))
    if len(annotated) <= limit:
        assert annotated <= set(frames)
    else:
        assert set(frames) <= annotated


def test_without_annotations_frames_are_evenly_spaced_from_end_to_end():
    assert choose_frames(100, [], 4) == [0, 33, 66, 99]
    gaps = np.diff(choose_frames(1000, [], 32))
    assert gaps.max() - gaps.min() <= 1


def test_annotated_frames_are_thinned_evenly():
    assert choose_frames(100, range(50, 61), 6) == [50, 52, 54, 56, 58, 60]


def test_the_rest_is_spread_over_the_clip():
    frames = choose_frames(300, [7, 290], 12)
    assert {7, 290} <= set(frames)
    assert np.diff([0, *sorted(set(frames) - {7, 290}), 299]).max() <= 35


@pytest.mark.parametrize(
    "num_frames, max_frames, expected",
    [
        (1, 32, [0, 0]),
        (2, 32, [0, 1]),
        (3, 32, [0, 1, 2, 2]),
        (5, 5, [0, 1, 3, 4]),
        (5, 6, [0, 1, 2, 3, 4, 4]),
        (9, 3, [0, 8]),
    ],
)
def test_short_clips_and_odd_limits(num_frames, max_frames, expected):
    assert choose_frames(num_frames, [], max_frames) == expected


def test_one_place_for_many_annotations_and_one_free_place():
    assert choose_frames(10, [4], 2) == [4, 5]
    assert choose_frames(1, [0], 2) == [0, 0]


@pytest.mark.parametrize("frame", [50, -1, 10**9])
def test_annotations_past_the_end(frame):
    with pytest.raises(DataError) as caught:
        choose_frames(50, [3, frame], 8)
    assert f"annotated frame number {frame} is past the end: the clip has 50 frames, 0 to 49" in str(caught.value)
    assert "do the annotations belong to this file?" in str(caught.value)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="max_frames is 1: two frames make one temporal patch"):
        choose_frames(10, [], 1)
    with pytest.raises(ValueError, match="the clip has no frames"):
        choose_frames(0, [], 8)
    with pytest.raises(ValueError, match="5 frames do not fill patches of 2"):
        supervised_patches([0, 1, 2, 3, 4], {}, 2)


def _mask(*cells):
    mask = np.zeros((3, 4), np.uint8)
    for cell in cells:
        mask[cell] = 1
    return mask


def test_a_patch_is_supervised_if_any_of_its_frames_is_annotated():
    masks = {10: _mask((0, 0)), 11: _mask((1, 1)), 30: _mask((2, 2)), 40: None, 99: _mask((0, 3))}
    patches = supervised_patches([0, 5, 10, 11, 20, 30, 40, 41], masks)
    assert list(patches) == [1, 2]  # 40 marks nothing, 99 was not chosen
    np.testing.assert_array_equal(patches[1], _mask((0, 0), (1, 1)))
    np.testing.assert_array_equal(patches[2], _mask((2, 2)))
    np.testing.assert_array_equal(masks[10], _mask((0, 0)))  # untouched


def test_other_patch_sizes_and_the_repeated_last_frame():
    masks = {2: _mask((0, 1)), 3: _mask((2, 3))}
    assert list(supervised_patches([0, 1, 2, 3], masks, 1)) == [2, 3]
    patches = supervised_patches([0, 1, 2, 3], masks, 4)
    np.testing.assert_array_equal(patches[0], _mask((0, 1), (2, 3)))
    np.testing.assert_array_equal(supervised_patches([1, 2, 3, 3], masks)[1], _mask((2, 3)))
    assert supervised_patches([0, 1], {}) == {}


def test_the_second_frame_alone():
    masks = {10: _mask((0, 0)), 11: _mask((1, 1)), 30: _mask((2, 2)), 40: _mask((0, 1)), 41: None, 50: _mask((1, 3))}
    patches = supervised_patches([5, 10, 10, 11, 30, 31, 40, 41, 50, 50], masks, supervise="second")
    assert list(patches) == [0, 1, 4]
    for patch, frame in ((0, 10), (1, 11), (4, 50)):
        np.testing.assert_array_equal(patches[patch], masks[frame])
    assert list(supervised_patches([10, 11], masks, 1, "second")) == [0, 1]
    different = {0: np.ones((3, 4), np.uint8), 1: np.ones((6, 8), np.uint8)}
    assert supervised_patches([0, 1], different, supervise="second")[0].shape == (6, 8)  # never joined


def test_masks_of_different_sizes_in_one_patch():
    masks = {0: np.ones((3, 4), np.uint8), 1: np.ones((6, 8), np.uint8)}
    with pytest.raises(DataError, match="differ in size"):
        supervised_patches([0, 1], masks)
    assert list(supervised_patches([0, 0, 1, 1], masks)) == [0, 1]


@pytest.mark.parametrize(
    ("num_frames", "rate", "annotated", "max_frames", "fps", "expected"),
    [
        (1000, 25, 0, 32, None, 32),
        (250, 25, 0, 32, 1.0, 10),
        (251, 25, 0, 32, 1.0, 12),  # 10.04 s: eleven, and even
        (300, 30000 / 1001, 0, 32, 30000 / 1001 / 30, 10),  # a rate that no float holds
        (250, 25, 15, 32, 1.0, 16),  # all that are annotated
        (250, 25, 40, 32, 1.0, 32),
        (25 * 3600, 25, 0, 64, 2.0, 64),
        (250, 25, 0, 7, 2.0, 7),  # choose_frames takes six of them
        (5, 25, 0, 32, 0.1, 2),
    ],
)
def test_frames_per_second(num_frames, rate, annotated, max_frames, fps, expected):
    info = MediaInfo(num_frames, rate, 48, 64)
    assert count_frames(info, annotated, Sampling(max_frames=max_frames, fps=fps)) == expected


LIMITS = PixelLimits(28, 4 * 28 * 28, 64 * 28 * 28)


@pytest.mark.parametrize("seed", range(200))
def test_total_pixels_hold_and_take_from_the_pixels_first(seed):
    rng = np.random.default_rng(seed)
    count = 2 * int(rng.integers(1, 40))
    height, width = (int(v) for v in rng.integers(60, 1500, 2))
    total = int(rng.integers(20, 3000)) * 28 * 28
    fewer, highest = fit_pixels(count, height, width, LIMITS, total)
    assert fewer * np.prod(LIMITS.size(fewer, height, width, highest)) <= total
    assert 2 <= fewer <= count and fewer % 2 == 0 and LIMITS.lowest <= highest <= LIMITS.highest
    if fewer < count:  # two more would not fit at any size
        assert (fewer + 2) * np.prod(LIMITS.size(fewer, height, width, LIMITS.lowest)) > total
    elif highest < LIMITS.highest and min(LIMITS.size(fewer, height, width, total // count)) > 28:
        assert highest == max(total // count, LIMITS.lowest)  # no frame is smaller than need be


def test_frames_become_smaller_then_fewer():
    info = MediaInfo(num_frames=100, fps=10, height=448, width=448)
    annotated = [10, 51, 90]

    def plan(total):
        return plan_frames(info, annotated, LIMITS, Sampling(max_frames=10, total_pixels=total))

    one = 28 * 28
    assert plan(None) == plan(10 * 64 * one) and plan(None).max_pixels is None and not plan(None).notes
    smaller = plan(10 * 20 * one)
    assert smaller.frames == plan(None).frames and smaller.max_pixels == 20 * one
    assert smaller.notes == ("10 frames of 224 × 224 pixels became 10 of 112 × 112 to keep total_pixels 156,800",)
    fewer = plan(6 * 4 * one + 1)
    assert len(fewer.frames) == 6 and set(annotated) <= set(fewer.frames) and fewer.max_pixels == 4 * one
    assert "became 6 of 56 × 56" in fewer.notes[0]
    with pytest.raises(DataError, match="two frames of 56 × 56 pixels, the least that min_pixels 3,136 allows"):
        plan(7 * one)
    wide = MediaInfo(num_frames=100, fps=10, height=28, width=28 * 300)
    with pytest.raises(DataError, match="refuses frames of 28 × 8400"):
        plan_frames(wide, [], LIMITS, Sampling(max_frames=10, total_pixels=10**6))
