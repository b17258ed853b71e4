"""Attention rows, key sets and masks of a sample."""

import numpy as np
import pytest
import torch

from tests.data.conftest import rle
from tests.data.sample.samples import TOKENS, H, W, mask


def test_only_supervised_patches_are_read_out(build, video):
    """Those of any object; the pairs count within them. The released code's normaliser needs all."""
    first, second = mask(0, 0), mask(30, 60)
    record = video(
        "<video>\nWhat is the <ins>dog</ins> doing?",
        "The <ins>ball</ins> rolls.",
        objects=({9: rle(first)}, {2: rle(second), 9: rle(second)}),
    )
    everything = build(record, max_frames=10)
    sample = build(record, max_frames=10, read_out="supervised")
    assert everything.patches == list(range(5)) and sample.rows == everything.rows
    found = [sample.frames.index(frame) // 2 for frame in (2, 9)]
    assert sample.patches == found and found[0] > 0
    visual = everything.key_sets[0].view(-1, TOKENS)
    assert torch.equal(sample.key_sets[0], visual[found].flatten()) and len(sample.key_sets) == 1
    for pair, full in zip(sample.pairs, everything.pairs, strict=True):
        assert sample.patches[pair[1] // TOKENS] * TOKENS == full[1] and sample.patch(pair) == everything.patch(full)
        assert pair[::2] == full[::2] and pair[2:] == full[2:]


def test_softmax_over_a_frame_has_a_row_for_each_token_and_patch(build, video):
    record = video(
        "<video>\nWhat is the <ins>dog</ins> doing?",
        "The <ins>Löwenbändiger</ins> rolls.",
        objects=({9: rle(mask(0, 0))}, {2: rle(mask(30, 60)), 9: rle(mask(10, 10))}),
    )
    plain, sample = build(record, max_frames=10, read_out="supervised"), build(record, max_frames=10, softmax="frame")
    visual = torch.nonzero(sample.inputs["mm_token_type_ids"]).flatten().view(-1, TOKENS)
    assert sample.over == "set" and plain.over == "range" and sample.patches == plain.patches
    assert len(sample.key_sets) == 2 and torch.equal(torch.stack(sample.key_sets), visual[sample.patches])
    tokens = len(plain.rows) - 1  # of the second noun
    assert tokens > 2 and len(sample.rows) == 1 + 2 * tokens == len(sample.pairs) == len(sample.tags)
    for index, (pair, before) in enumerate(zip(sample.pairs, plain.pairs, strict=True)):
        row, old = sample.rows[pair.row], plain.rows[before.row]
        assert pair == (index, 0, 2, 3, before.mask) and row.position == old.position
        assert sample.patch(pair) == plain.patch(before) == sample.patches[row.key_set]
        keys = sample.key_sets[row.key_set].tolist()
        assert (row.key_start, row.key_end) == (keys[0], keys[-1] + 1)
        assert sample.tags[pair.row] == plain.tags[before.row]


def test_softmax_over_all_visual_tokens_is_read_out_on_all(build, video):
    record = video("A <ins>dog</ins>", "a", objects=({3: rle(mask())},))
    causal, sample = build(record), build(record, softmax="visual", read_out="supervised")
    visual = torch.nonzero(sample.inputs["mm_token_type_ids"]).flatten()
    assert sample.over == "set" and sample.pairs == causal.pairs
    assert torch.equal(sample.key_sets[0], visual) and len(sample.key_sets) == 1
    assert [row[1:3] for row in sample.rows] == [(int(visual[0]), int(visual[-1]) + 1)]


def test_noun_of_several_tokens_gives_several_rows_that_share_masks(build, video, tokenizer):
    masks = {3: rle(mask(0, 0)), 4: rle(mask(10, 40))}
    sample = build(video("The “<ins>Löwenbändiger</ins>” (a <ins>dog</ins>)?", "ja", objects=(masks, {4: masks[4]})))
    ids = sample.inputs["input_ids"]
    positions = [row[0] for row, tag in zip(sample.rows, sample.tags, strict=True) if tag == 0]
    assert len(positions) > 3 and positions == list(range(positions[0], positions[-1] + 1))
    assert tokenizer.decode(ids[positions]).strip("“") == "Löwenbändiger"
    # All 12 frames: frames 3 and 4 are in patches 1 and 2.
    assert sample.pairs == [
        pair for row in range(len(positions)) for pair in ((row, 1 * TOKENS, 2, 3, 0), (row, 2 * TOKENS, 2, 3, 1))
    ] + [(len(positions), 2 * TOKENS, 2, 3, 2)]
    assert len(sample.masks) == 3


def test_mask_of_a_patch_is_the_union_of_its_frames(build, video):
    objects = ({6: rle(mask(0, 0)), 7: rle(mask(40, 60)), 8: None, 9: rle(mask() * 0)},)
    sample = build(video("A <ins>dog</ins>", "a", objects=objects))
    assert sample.pairs == [(0, 3 * TOKENS, 2, 3, 0)]  # a null mask and one without pixels supervise nothing
    assert np.array_equal(sample.masks[0], mask(0, 0) | mask(40, 60))


@pytest.mark.parametrize("softmax", ["causal", "frame"])
def test_only_the_second_frame_of_a_patch_supervises(build, video, softmax):
    """Frames 2 and 3, 7, and 8 have masks; the pairs of frames are (2, 3), (6, 7) and (8, 9)."""
    objects = ({2: rle(mask(0, 0)), 3: rle(mask(20, 20)), 7: rle(mask(40, 60)), 8: rle(mask(0, 60))},)
    record = video("A <ins>dog</ins>", "a", objects=objects)
    either = build(record, softmax=softmax)
    sample = build(record, softmax=softmax, supervise="second")
    assert [either.patch(pair) for pair in either.pairs] == [1, 3, 4]
    assert [sample.patch(pair) for pair in sample.pairs] == [1, 3] and sample.frames == either.frames
    assert np.array_equal(either.masks[0], mask(0, 0) | mask(20, 20))
    assert len(sample.masks) == 2
    assert np.array_equal(sample.masks[0], mask(20, 20)) and np.array_equal(sample.masks[1], mask(40, 60))
    first_alone = build(video("A <ins>dog</ins>", "a", objects=({2: rle(mask())},)), supervise="second")
    assert (first_alone.rows, first_alone.masks, first_alone.key_sets) == ([], [], [])


def test_the_repeated_last_frame_is_the_second_of_its_patch(build, video, make_record, tmp_path):
    from PIL import Image

    record = video("A <ins>dog</ins>", "a", objects=({2: rle(mask())},), count=3)
    sample = build(record, supervise="second")
    assert sample.frames == [0, 1, 2, 2] and sample.pairs == [(0, TOKENS, 2, 3, 0)]
    Image.new("RGB", (W, H)).save(tmp_path / "a.png")
    image = make_record("A <ins>dog</ins>", "a", kind="image", media=tmp_path / "a.png", objects=({0: rle(mask())},))
    assert len(build(image, supervise="second").pairs) == 1


def test_noun_without_masks_has_no_rows(build, video):
    sample = build(video("<ins>dog</ins> and <ins>ball</ins>", "a", objects=({}, {3: None})))
    assert (sample.rows, sample.pairs, sample.masks, sample.key_sets, sample.tags) == ([], [], [], [], [])
    assert len(sample.inputs["labels"]) > 0


def test_predictor_rows_are_those_before(build, video):
    record = video("The <ins>Löwenbändiger</ins>", "ja", objects=({3: rle(mask())},))
    noun, predictor = build(record), build(record, query_position="predictor")
    assert [row[0] for row in predictor.rows] == [row[0] - 1 for row in noun.rows]
    assert [row[2] for row in predictor.rows] == [row[0] + 1 for row in predictor.rows]
    assert predictor.pairs == noun.pairs


def test_predictor_of_a_noun_right_after_the_video(build, video, tokenizer):
    record = video("<video><ins>dog</ins>", "ja", objects=({3: rle(mask())},))
    sample = build(record, query_position="predictor")
    (position, _, key_end, _), *_ = sample.rows
    assert tokenizer.decode(sample.inputs["input_ids"][position]) == "<|vision_end|>"
    assert key_end == position + 1 == int(sample.key_sets[0][-1]) + 2


@pytest.mark.parametrize("query_position", ["noun", "predictor"])
def test_full_softmax_goes_over_the_whole_sequence(build, video, query_position):
    record = video("The <ins>dog</ins>", "ja", objects=({3: rle(mask())},))
    sample = build(record, softmax="full", query_position=query_position)
    assert [row[1:3] for row in sample.rows] == [(0, len(sample.inputs["input_ids"]))] * len(sample.rows)


def test_full_softmax_allows_a_noun_before_the_video(build, video):
    record = video("The <ins>dog</ins> in <video>", "ja", objects=({3: rle(mask())},))
    assert len(build(record, softmax="full").rows) == 1
