import numpy as np
import pytest

from swim_fast.data.errors import DataError
from swim_fast.data.sampling import choose_frames, supervised_patches


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


def test_masks_of_different_sizes_in_one_patch():
    masks = {0: np.ones((3, 4), np.uint8), 1: np.ones((6, 8), np.uint8)}
    with pytest.raises(DataError, match="differ in size"):
        supervised_patches([0, 1], masks)
    assert list(supervised_patches([0, 0, 1, 1], masks)) == [0, 1]
