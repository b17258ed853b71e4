"""Samples of videos, images and texts: tokens, labels, times, frames."""

import unicodedata

import numpy as np
import pytest
import torch

from swim_fast.data.sample.builder import Sample
from swim_fast.data.sample.encoding import label_spans
from swim_fast.families import Clip
from swim_fast.families.patched import seconds_per_patch
from swim_fast.frame_shares import FrameShare
from tests.data.conftest import builder_of, rle
from tests.data.sample.samples import TOKENS, H, W, labelled, mask, shown_numbers


def test_video_sample(build, video, tokenizer):
    first, second = mask(0, 0), mask(30, 60)
    record = video(
        "<video>\nWhat is the <ins>dog</ins> doing?",
        "The <ins>ball</ins> rolls.",
        objects=({5: rle(first), 9: None}, {2: {"segmentation": rle(second)}}),
    )
    sample = build(record, max_frames=6)
    ids = sample.inputs["input_ids"]
    assert sample.name == "file.jsonl:3 (name)"
    assert len(sample.frames) == 6
    assert {2, 5} <= set(sample.frames)
    assert shown_numbers(sample) == sample.frames
    assert sample.inputs["video_grid_thw"].tolist() == [[3, 4, 6]]

    visual = torch.nonzero(sample.inputs["mm_token_type_ids"] == 2).flatten()
    assert len(visual) == 3 * TOKENS
    assert set(tokenizer.convert_ids_to_tokens(ids[visual])) == {"<|video_pad|>"}
    assert torch.equal(sample.key_sets[0], visual) and len(sample.key_sets) == 1

    assert [tokenizer.decode(ids[row[0]]) for row in sample.rows] == [" dog", " ball"]
    assert sample.tags == [0, 1]
    assert all(row == (row[0], 0, row[0] + 1, 0) for row in sample.rows)
    patches = [sample.frames.index(5) // 2, sample.frames.index(2) // 2]
    assert sample.pairs == [(0, patches[0] * TOKENS, 2, 3, 0), (1, patches[1] * TOKENS, 2, 3, 1)]
    assert [m.dtype for m in sample.masks] == [torch.uint8] * 2
    assert np.array_equal(sample.masks[0], first) and np.array_equal(sample.masks[1], second)
    assert labelled(sample, tokenizer) == ["The ball rolls.<|im_end|>"]
    assert sample.notes == []
    assert all(sample.inputs[key].dtype == torch.int64 for key in ("input_ids", "labels", "mm_token_type_ids"))


@pytest.mark.parametrize("max_frames", [2, 6, 12])
def test_ranks_that_share_a_video_decode_their_part_of_it(processor, video, max_frames):
    """All else is that of the whole; a clip of one patch is everyone's, and with one of three a rank has nothing."""
    record = video("The <ins>dog</ins>?", "It runs.", objects=({5: rle(mask(0, 0))},))
    whole = builder_of(processor, max_frames=max_frames)(record)
    patches, parts = whole.inputs["video_grid_thw"][0, 0].item(), []
    for rank in range(4):
        shared = builder_of(processor, FrameShare(4, rank), max_frames=max_frames)
        decoded = count_decoded(shared)
        sample = shared(record)
        assert sum(decoded) == (2 if patches == 1 else 2 * (patches * (rank + 1) // 4 - patches * rank // 4))
        parts.append(sample.inputs.pop("pixel_values_videos").patches())
        assert sample.inputs.keys() == whole.inputs.keys() - {"pixel_values_videos"}
        assert all(torch.equal(value, whole.inputs[key]) for key, value in sample.inputs.items())
        assert (sample.rows, sample.pairs, sample.frames) == (whole.rows, whole.pairs, whole.frames)
    parts = parts[:1] if patches == 1 else parts
    assert torch.equal(torch.cat(parts), whole.inputs["pixel_values_videos"].patches())


def count_decoded(builder):
    """The frames of each request of a builder, a list that grows."""
    counts, read = [], builder.reader.frames
    builder.reader.frames = lambda record, frames, change=None: (
        counts.append(len(frames)) or read(record, frames, change)
    )
    return counts


def test_all_assistant_turns_are_labelled_and_nothing_else(build, video, tokenizer):
    answers = ["The  dog.\nIt runs (fast).", "Nein, der Löwe 🐶!", "", " cafe\u0301"]
    turns = [text for answer in answers for text in ("What? Yes.", answer)]
    sample = build(video("Watch", turns[1], *turns[2:], "Bye"))
    expected = [unicodedata.normalize("NFC", answer) + "<|im_end|>" for answer in answers]
    assert labelled(sample, tokenizer) == expected


def test_headers_are_labelled_if_asked_for(build, video, tokenizer):
    record = video("Watch", "", "What?", "assistant", "Bye")
    plain, sample = build(record), build(record, label_header=True)
    assert labelled(sample, tokenizer) == [
        "<|im_start|>assistant\n<|im_end|>",
        "<|im_start|>assistant\nassistant<|im_end|>",
    ]
    assert torch.equal(sample.inputs["input_ids"], plain.inputs["input_ids"])
    added = (sample.inputs["labels"] != plain.inputs["labels"]).sum()
    assert added == 2 * len(tokenizer("<|im_start|>assistant\n")["input_ids"])


def test_label_spans_takes_tokens_wholly_inside():
    """The second token begins in the template's header, the fourth has no characters, the last lies behind."""
    offsets = torch.tensor([[0, 4], [4, 6], [6, 9], [9, 9], [9, 12], [12, 13]])
    labels = label_spans(torch.arange(10, 16), offsets, [(5, 12)])
    assert labels.tolist() == [-100, -100, 12, -100, 14, -100]
    assert label_spans(torch.arange(10, 16), offsets, []).tolist() == [-100] * 6


@pytest.mark.parametrize("fps", [1, 2, 4, 30])
def test_seconds_per_patch_of_dense_frames(build, video, fps):
    sample = build(video("a", "b", fps=fps), max_frames=12)
    assert sample.frames == list(range(12))
    assert sample.inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / fps])


@pytest.mark.parametrize("fps", [1, 2, 4, 30])
def test_seconds_per_patch_of_sparse_frames(build, video, fps):
    sample = build(video("a", "b", count=61, fps=fps), max_frames=4)
    assert sample.frames == [0, 20, 40, 60]
    assert sample.inputs["second_per_grid_ts"].tolist() == pytest.approx([2 * 20 / fps])


def test_seconds_per_patch_as_the_released_code_has_them(build, video):
    record = video("a", "b", count=61, fps=4)
    measured, one = build(record, max_frames=4), build(record, max_frames=4, seconds_per_patch="one")
    assert measured.inputs["second_per_grid_ts"].tolist() == [10.0]
    assert one.inputs["second_per_grid_ts"].tolist() == [1.0] and one.frames == measured.frames
    assert one.inputs["second_per_grid_ts"].dtype == torch.float32


def test_system_prompt_reaches_the_tokens(build, video, tokenizer):
    record = video("<video>\nWhat?", "This.")
    plain, other, none = (build(record, system_prompt=prompt) for prompt in (None, "Look.", ""))
    texts = [tokenizer.decode(sample.inputs["input_ids"]) for sample in (plain, other, none)]
    assert texts[0].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert texts[1] == texts[0].replace("You are a helpful assistant.", "Look.")
    assert texts[2] == texts[0][texts[0].index("<|im_start|>user") :]
    assert [labelled(sample, tokenizer) for sample in (plain, other, none)] == [["This.<|im_end|>"]] * 3


def test_seconds_per_patch_formula():
    def seconds(*frames):
        return seconds_per_patch(Clip(frames, 5, 20, 8, 8), 2)

    assert seconds(0, 1, 2, 10, 10) == pytest.approx(2 * 10 / 3 / 5)
    assert seconds(7, 7) == pytest.approx(2 / 5)


@pytest.mark.parametrize(("seconds", "step"), [("measured", 8), ("one", 2)])
def test_the_models_temporal_positions_are_seconds(build, video, model, seconds, step):
    """tokens_per_second is 2 in the tiny model: a patch of 2 frames at half a frame per second advances by 8."""
    inputs = build(video("a", "b", fps=0.5), seconds_per_patch=seconds).inputs
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"][None],
        inputs["mm_token_type_ids"][None],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs["second_per_grid_ts"],
    )
    time = positions[0, 0][inputs["mm_token_type_ids"] == 2].reshape(6, TOKENS)
    assert (time - time[0, 0])[:, 0].tolist() == [step * patch for patch in range(6)]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_short_and_odd_clips(build, video, count):
    sample = build(video("A <ins>dog</ins>", "a", objects=({count - 1: rle(mask())},), count=count))
    expected = list(range(count)) + [count - 1] * (count % 2)
    assert sample.frames == shown_numbers(sample) == expected
    patches = len(expected) // 2
    assert sample.inputs["video_grid_thw"].tolist() == [[patches, 4, 6]]
    assert sample.pairs == [(0, (patches - 1) * TOKENS, 2, 3, 0)]
    assert sample.inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / 4])


def test_too_long_samples_get_fewer_frames(build, video):
    record = video("Where is the <ins>dog</ins>?", "There.", objects=({5: rle(mask())},))
    long = build(record)
    text = len(long.inputs["input_ids"]) - 6 * TOKENS
    limit = text + 3 * TOKENS + 2
    short = build(record, max_tokens=limit)
    assert len(short.frames) == 6 and 5 in short.frames
    assert len(short.inputs["input_ids"]) == text + 3 * TOKENS
    assert shown_numbers(short) == short.frames
    assert short.pairs == [(0, short.frames.index(5) // 2 * TOKENS, 2, 3, 0)]
    assert short.notes == [f"thinned from 12 to 6 frames: {text + 6 * TOKENS} tokens > max_tokens {limit}"]
    assert build(record, max_tokens=text + 6 * TOKENS).notes == []
    assert len(build(record, max_tokens=text + TOKENS).frames) == 2


def test_more_annotated_frames_than_max_frames(build, video):
    objects = ({frame: rle(mask(frame, frame)) for frame in range(12)},)
    sample = build(video("A <ins>dog</ins>", "a", objects=objects), max_frames=4)
    assert len(sample.frames) == 4 and len(sample.pairs) == 2
    for patch, got in enumerate(sample.masks):
        first, second = sample.frames[2 * patch : 2 * patch + 2]
        assert np.array_equal(got, mask(first, first) | mask(second, second))


def test_pixel_limits(build, video):
    record = video("a", "b")
    assert build(record).inputs["video_grid_thw"].tolist() == [[6, 4, 6]]
    assert build(record, max_pixels=4 * 28 * 28).inputs["video_grid_thw"].tolist() == [[6, 2, 4]]  # each alone
    assert build(record, min_pixels=20 * 28 * 28).inputs["video_grid_thw"].tolist() == [[6, 8, 12]]
    both = build(record, min_pixels=28 * 28, max_pixels=28 * 28)
    assert both.inputs["video_grid_thw"].tolist() == [[6, 2, 2]]


def test_image_sample(build, make_record, tmp_path, tokenizer):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = make_record(
        "<image>\nThe <ins>dog</ins>?", "Yes.", kind="image", media=tmp_path / "a.png", objects=({0: rle(mask())},)
    )
    sample = build(record)
    assert sample.inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert sample.inputs["pixel_values"].patches().shape == (24, 3 * 2 * 14 * 14)
    assert "second_per_grid_ts" not in sample.inputs and "pixel_values_videos" not in sample.inputs
    assert sample.frames == [0]
    assert sample.pairs == [(0, 0, 2, 3, 0)]
    assert np.array_equal(sample.masks[0], mask())
    assert torch.equal(sample.key_sets[0], torch.nonzero(sample.inputs["mm_token_type_ids"] == 1).flatten())
    assert build(record, max_pixels=28 * 28).inputs["image_grid_thw"].tolist() == [[1, 2, 2]]


def test_text_sample(build, make_record, tokenizer):
    sample = build(make_record("What?", "This."))
    assert set(sample.inputs) == {"input_ids", "labels", "mm_token_type_ids"}
    assert not sample.inputs["mm_token_type_ids"].any()
    assert labelled(sample, tokenizer) == ["This.<|im_end|>"]
    assert isinstance(sample, Sample) and sample.frames == sample.rows == []
