import dataclasses
import pickle
import time
import unicodedata

import numpy as np
import pytest
import torch

from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.sample.encoding import label_spans
from swim_fast.data.source.errors import DataError
from swim_fast.families import Clip
from swim_fast.families.patched import seconds_per_patch
from swim_fast.options import Sampling
from tests.data.conftest import box, builder_of, rle
from tests.helpers.clips import read_number

H, W = 64, 96  # of the clips; 2 × 3 visual tokens a patch
TOKENS = 6


@pytest.fixture(scope="module")
def build(processor):
    """build(record, **options), by default with a causal softmax: one row for each token of a noun."""
    builders = {}

    def make(record, **options):
        options = {"softmax": "causal"} | options
        key = tuple(sorted(options.items()))
        if key not in builders:
            builders[key] = builder_of(processor, **options)
        return builders[key](record)

    yield make
    for builder in builders.values():
        builder.reader.close()


@pytest.fixture
def video(make_record, clip):
    """video(*turns, objects=(), count=12, fps=4): a record of a clip."""

    def make(*turns, objects=(), count=12, fps=4, **options):
        return make_record(*turns, kind="video", media=clip(count, fps, H, W), objects=objects, **options)

    return make


def mask(top=0, left=0):
    return box(H, W, top, top + 20, left, left + 30)


def labelled(sample, tokenizer):
    """The stretches of labelled tokens, as text."""
    labels = sample.inputs["labels"]
    chosen = labels != -100
    assert torch.equal(labels[chosen], sample.inputs["input_ids"][chosen])
    edges = torch.diff(chosen.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten().tolist()
    return [tokenizer.decode(labels[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def shown_numbers(sample):
    """The numbers drawn on the frames, read back out of the patches that the vision tower gets."""
    frames, height, width = sample.inputs["video_grid_thw"][0].tolist()
    patches = (
        sample.inputs["pixel_values_videos"].patches().reshape(frames, height // 2, width // 2, 2, 2, 3, 2, 14, 14)
    )
    # [patch, row, column, row in block, column in block, colour, frame, y, x] → [frame, y, x, colour]
    pixels = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * frames, height * 14, width * 14, 3)
    std, mean = torch.tensor([0.26862954, 0.26130258, 0.27577711]), torch.tensor([0.48145466, 0.4578275, 0.40821073])
    return [read_number(frame) for frame in ((pixels * std + mean) * 255).numpy()]


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
