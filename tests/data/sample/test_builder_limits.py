"""Records, options and processors that the builder refuses, and limits of pixels, tokens and masks."""

import dataclasses
import pickle
import time

import pytest
import torch

from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.errors import DataError
from swim_fast.options import Sampling
from tests.data.conftest import box, builder_of, rle
from tests.data.sample.samples import TOKENS, H, W, mask, shown_numbers

BAD = "file.jsonl, record 3 (name), "


@pytest.mark.parametrize(
    ("turns", "objects", "options", "message"),
    [
        (["a <|im_end|>", "b"], (), {}, BAD + "conversations[0]: the text holds '<|im_end|>', a special token"),
        (["a"], (), {}, BAD + "conversations: no assistant turn and no tagged noun: nothing to train on"),
        (["<ins>a</ins>", "b"], ({12: None},), {}, BAD + "annotation[0]['12']: frame number past the end: the video has"
         " 12 frames, counted from 0"),
        (["<ins>a</ins>", "b"], ({-1: None},), {}, BAD + "annotation[0]['-1']: frame number past the end"),
        (["<ins>a</ins> <ins>b</ins>", "b"], ({}, {3: rle(box(W, H, 0, 9, 0, 9))}), {},
         BAD + "annotation[1]['3']: mask size 96 x 64 does not fit the video's 64 x 96"),
        (["<ins>a</ins>", "b"], ({3: {"size": [H, W], "counts": [5]}},), {},
         BAD + "annotation[0]['3']: run-length code does not decode"),
        (["<ins>a</ins>", "b"], ({2: rle(mask()), 3: rle(mask()[::2, ::2])},), {},
         BAD + "annotation[0]: masks of one object differ in size: (32, 48) and (64, 96)"),
        (["The <ins>dog</ins> in <video>", "b"], ({3: rle(mask())},), {},
         BAD + "tag 0: the noun comes before the video, to which it therefore cannot attend"),
        (["a", "b"], (), {"max_tokens": 30}, BAD[:-2] + ": too long: "),
    ],
)  # fmt: skip
def test_bad_records(build, video, turns, objects, options, message):
    with pytest.raises(DataError) as error:
        build(video(*turns, objects=objects), **options)
    assert str(error.value).startswith(message)


def test_reason_of_a_sample_that_never_fits(build, video, make_record, tmp_path):
    with pytest.raises(
        DataError, match="with 2 frames, and even 2 frames do not fit into max_tokens 30; lower max_pix"
    ):
        build(video("a", "b", count=2), max_tokens=30)
    with pytest.raises(DataError, match="with 12 frames, and even 2 frames do not fit into max_tokens 30"):
        build(video("a", "b"), max_tokens=30)
    with pytest.raises(DataError, match="tokens > max_tokens 10; shorten the text or raise max_tokens"):
        build(make_record("a", "b"), max_tokens=10)
    from PIL import Image

    Image.new("RGB", (W, H)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="tokens > max_tokens 30; lower max_pixels or raise max_tokens"):
        build(make_record("a", "b", kind="image", media=tmp_path / "a.png"), max_tokens=30)


def test_broken_and_missing_clips(build, make_record, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    for name in ("broken.mp4", "missing.mp4"):
        with pytest.raises(DataError) as error:
            build(make_record("a", "b", kind="video", media=tmp_path / name))
        assert str(error.value).startswith(BAD + "video: ")
        assert name in error.value.reason


def test_what_the_processor_refuses_is_a_data_error(build, make_record, tmp_path):
    from PIL import Image

    Image.new("RGB", (1300, 4)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match="the model's processor refuses the record: absolute aspect ratio"):
        build(make_record("a", "b", kind="image", media=tmp_path / "strip.png"))


def test_noun_that_the_tokenizer_drops(processor, video):
    other = pickle.loads(pickle.dumps(processor))
    from tokenizers import normalizers

    other.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("dog", "")
    with pytest.raises(DataError, match="tag 0: the noun has no token of its own; tag a visible word"):
        SampleBuilder(other)(video("A <ins>dog</ins>.", "b", objects=({3: rle(mask())},)))


def test_no_warning_about_pixels_per_frame(build, video, caplog):
    from transformers.utils import logging

    logging.get_logger("transformers").propagate, before = True, logging.get_logger("transformers").propagate
    try:
        build(video("a", "b"))
    finally:
        logging.get_logger("transformers").propagate = before
    assert "cap_pixels_per_frame" not in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"query_position": "middle"}, "query_position is 'middle'; choose one of: noun, predictor"),
        ({"softmax": "none"}, "softmax is 'none'; choose one of: frame, visual, causal, full"),
        ({"reader": "vlc"}, "reader is 'vlc'; choose one of: decord, torchcodec, pyav"),
        ({"max_frames": 1}, "max_frames is 1; it must be at least 2"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be positive"),
        ({"max_pixels": -4}, "max_pixels is -4; it must be positive"),
        ({"decode_timeout": 0}, "decode_timeout is 0; it must be positive"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels 9 is above max_pixels 8"),
    ],
)
def test_bad_options(options, reason):
    with pytest.raises(ValueError) as error:
        builder_of(None, **options)
    assert str(error.value) == reason


def test_unusable_processors(processor):
    with pytest.raises(
        ValueError, match="above max_pixels 783, one of which is Qwen2VLImageProcessor's own; give both"
    ):
        SampleBuilder(processor, Sampling(max_pixels=783))
    other = pickle.loads(pickle.dumps(processor))
    other.video_processor.temporal_patch_size = 4
    with pytest.raises(ValueError, match="a temporal patch of 4 frames; only 1 and 2 are supported"):
        SampleBuilder(other)


def test_slow_tokenizers_are_refused(processor, monkeypatch):
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="nouns can only be located with a fast tokenizer"):
        SampleBuilder(processor)


def test_builder_is_picklable_after_use(processor, video):
    builder = SampleBuilder(processor)
    record = video("The <ins>dog</ins>", "ja", objects=({3: rle(mask())},))
    sample = builder(record)
    copy = pickle.loads(pickle.dumps(builder))(record)
    assert copy.rows == sample.rows
    assert torch.equal(*(built.inputs["pixel_values_videos"].patches() for built in (copy, sample)))


def test_frames_per_second_of_a_clip(build, video):
    """Twelve frames at four per second."""
    record = video("The <ins>dog</ins>", "ja", objects=({7: rle(mask())},))
    sample = build(record, fps=1.0)
    assert len(sample.frames) == 4 and 7 in sample.frames and shown_numbers(sample) == sample.frames
    assert sample.inputs["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert len(build(record, fps=1.0, max_frames=2).frames) == 2
    many = video("The <ins>dog</ins>", "ja", objects=({frame: rle(mask()) for frame in range(7)},))
    assert set(range(7)) <= set(build(many, fps=1.0).frames)
    assert build(record, fps=100.0).frames == list(range(12))


def test_total_pixels_make_frames_smaller_then_fewer(build, video):
    record = video("The <ins>dog</ins>", "ja", objects=({7: rle(mask())},))
    one = 28 * 28
    whole = build(record, max_frames=8, total_pixels=8 * TOKENS * one)
    assert whole.inputs["video_grid_thw"].tolist() == [[4, 4, 6]] and whole.notes == []
    sample = build(record, max_frames=8, total_pixels=8 * 3 * one)
    assert sample.frames == whole.frames and sample.inputs["video_grid_thw"].tolist() == [[4, 2, 4]]
    assert sample.notes == ["8 frames of 56 × 84 pixels became 8 of 28 × 56 to keep total_pixels 18,816"]
    height, width = sample.pairs[0][2:4]
    assert (height, width) == (1, 2) and len(sample.key_sets[0]) == 4 * 2
    sample = build(record, max_frames=8, min_pixels=TOKENS * one, total_pixels=5 * TOKENS * one)
    assert len(sample.frames) == 4 and 7 in sample.frames and shown_numbers(sample) == sample.frames
    assert sample.inputs["video_grid_thw"].tolist() == [[2, 4, 6]]
    with pytest.raises(DataError) as caught:
        build(record, total_pixels=one)
    assert "file.jsonl, record 3 (name), video: two frames of 28 × 28 pixels" in str(caught.value)


def test_max_tokens_thin_what_total_pixels_have_left(build, video):
    record = video("The <ins>dog</ins>", "ja", objects=({7: rle(mask())},))
    options = {"max_frames": 8, "total_pixels": 8 * 3 * 28 * 28}
    whole = build(record, **options)
    sample = build(record, **options, max_tokens=len(whole.inputs["input_ids"]) - 1)
    assert sample.inputs["video_grid_thw"].tolist() == [[3, 2, 4]] and 7 in sample.frames
    assert len(sample.notes) == 2 and "thinned from 8 to 6 frames" in sample.notes[1]


def test_frames_with_pixels_are_preferred_to_empty_masks(build, video):
    """Trackers write an empty code into every frame in which the object is hidden."""
    empty = {"size": [H, W], "counts": [H * W]}
    objects = ({frame: rle(mask()) if frame in (4, 9) else empty for frame in range(12)},)
    sample = build(video("<ins>dog</ins>", "a", objects=objects), max_frames=2)
    assert sample.frames == [4, 9] and sample.tags_without_mask == 0 and len(sample.masks) == 1


def test_tags_without_a_mask_in_the_frames_taken_are_counted(build, video, make_record):
    empty = {"size": [H, W], "counts": [H * W]}
    record = video("<ins>a</ins> <ins>b</ins> <ins>c</ins>", "a", objects=({3: empty}, {}, {5: rle(mask())}))
    assert build(record).tags_without_mask == 2 and build(record, supervise="second").tags_without_mask in (2, 3)
    assert build(make_record("a", "b")).tags_without_mask == 0


def test_polygons_of_a_copy_of_half_the_size_cover_the_same_part(build, video):
    square = [[10, 5, 40, 5, 40, 30, 10, 30]]
    large = video("<ins>dog</ins>", "a", objects=({3: [[2 * value for value in square[0]]]},))
    small = dataclasses.replace(video("<ins>dog</ins>", "a", objects=({3: square},)), mask_size=(H // 2, W // 2))
    areas = [build(record).masks[0].float().mean().item() for record in (large, small)]
    assert areas[0] == pytest.approx(areas[1], rel=0.1)


def test_masks_that_would_not_fit_into_memory_are_refused(build, video, monkeypatch):
    monkeypatch.setattr("swim_fast.data.sample.builder.MAX_MASK_PIXELS", 2 * H * W)
    objects = [{3: rle(mask()), 5: rle(mask())}]
    record = video("<ins>dog</ins>", "a", objects=objects)
    assert len(build(record).masks) == 2
    record = video("<ins>dog</ins> <ins>cat</ins>", "a", objects=objects * 2)
    with pytest.raises(
        DataError, match="annotation: its masks have 24,576 pixels in the frames taken, more than 12,288"
    ):
        build(record)


@pytest.mark.parametrize("place", ["turn", "turns"])
def test_many_tags_take_linear_time(build, video, place):
    count = 5_000
    texts = ["<ins>dog</ins> " * count, "a"] if place == "turn" else ["<ins>dog</ins>", "a"] * count
    begin = time.process_time()
    sample = build(video(*texts, objects=({3: rle(mask())}, *[{}] * (count - 1))), softmax="frame")
    assert sample.tags_without_mask == count - 1 and set(sample.tags) == {0}
    assert time.process_time() - begin < 8


def test_a_problem_keeps_a_record_from_a_length_and_from_a_sample(processor, video):
    """Masks are judged in all frames, also in those that are not taken."""
    builder = builder_of(processor, max_frames=2)
    damaged = {"size": [H, W], "counts": [5]}
    for objects, turns in (
        (({3: rle(mask()), 4: rle(mask()), 9: damaged},), ["<ins>dog</ins>", "a"]),
        (({3: rle(mask())},), ["<ins>dog</ins> <video>", "a"]),
    ):
        record, reasons = video(*turns, objects=objects), []
        for judge in (builder, builder.length):
            with pytest.raises(DataError) as caught:
                judge(record)
            reasons.append(str(caught.value))
        assert reasons[0] == reasons[1]
    builder.reader.close()


def test_an_object_that_is_tagged_again_shares_its_masks(build, video):
    objects = ({2: rle(mask()), 7: rle(mask())}, {2: rle(1 - mask())}, {2: rle(mask()), 7: rle(mask())})
    sample = build(video("The <ins>dog</ins>, the <ins>ball</ins>, the <ins>dog</ins>", "yes", objects=objects))
    assert len(sample.masks) == 3
    assert [sample.tags[pair.row] for pair in sample.pairs] == [0, 0, 1, 2, 2]
    assert [pair.mask for pair in sample.pairs] == [0, 1, 2, 0, 1]
    assert [sample.patch(pair) for pair in sample.pairs][:2] == [sample.patch(pair) for pair in sample.pairs][3:]
