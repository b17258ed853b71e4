import json
import sys

import numpy as np
import pytest
from PIL import Image

from swim_fast.data.sample.builder import SampleBuilder, SampleOptions
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile
from swim_fast.viz import record as show
from swim_fast.viz.record import show_record
from tests.data.conftest import box, rle

H, W = 64, 96


@pytest.fixture
def file(tmp_path, clip):
    """A video with two nouns, a text, an image, a video of odd length, a broken record."""
    Image.new("RGB", (W, H)).save(tmp_path / "a.png")
    ball, cup = box(H, W, 0, 20, 0, 30), box(H, W, 30, 60, 50, 90)

    def entry(name, *texts, **fields):
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"id": name, "conversations": turns, **fields}

    annotation = [{"3": rle(ball), "7": None}, {"3": rle(cup), "9": rle(cup)}]
    two = "<video>\nThe <ins>ball</ins> costs $5 or $6?", "The blue <ins>cup</ins> 小 🐶."
    ball_upright = [{"2": rle(ball.T.copy())}]
    entries = [
        entry("two", *two, video=str(clip(12)), annotation=annotation),
        entry("text", "What?", "This. " * 2000),
        entry("image", "A <ins>ball</ins>?", "Yes.", image="a.png", annotation=[{"0": rle(ball)}]),
        entry("odd", "A <ins>ball</ins>?", "Yes.", video=str(clip(3, 4, 96, 64)), annotation=ball_upright),
        entry("bad", "A <ins>ball?", "Yes.", video="missing.mp4", annotation=[{}]),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return path


def prepare(file, processor, index, **options):
    return show._prepare(RecordFile(file)[index], SampleBuilder(processor, SampleOptions(**options)), processor)


def plain(line):
    return "".join(words for words, *_ in line)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_png_is_written_without_pyplot(file, processor, tmp_path, index, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    out = show_record(file, index, tmp_path / "new" / "record.png", processor, SampleOptions(max_frames=6))
    assert out == tmp_path / "new" / "record.png"
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width == show.WIDTH * show.DPI
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    if index != 1:
        assert tuple(int(show.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)) in colours
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_masks_are_painted_where_they_are(file, processor):
    shown = prepare(file, processor, 0)
    number = shown.sample.frames.index(3)
    assert sorted(shown.masks[number]) == [0, 1]
    painted = show._picture(shown, number, most_pixels=W).astype(int)
    clean = shown.pixels[number].astype(int)
    orange, blue = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in show.COLOURS[:2])
    assert np.abs(painted[8:12, 8:20] - (clean[8:12, 8:20] + orange) / 2).max() <= 1  # inside: half and half
    assert (painted[18, 1:28] == orange).all() and (painted[31, 60:80] == blue).all()  # outline
    untouched = np.ones((H, W), bool)
    untouched[:24, :34] = untouched[26:, 46:] = False
    assert (painted[untouched] == clean[untouched]).all()
    assert shown.masks[shown.sample.frames.index(7)] == {}


def test_supervised_patches(file, processor):
    shown = prepare(file, processor, 0)
    assert shown.grid == (6, 2, 3)
    assert [shown.supervised(patch) for patch in range(6)] == [[], [0, 1], [], [], [1], []]
    assert [shown.noun(tag) for tag in (0, 1)] == ["ball", "cup"]


def test_text_is_shown_as_the_model_reads_it(file, processor):
    lines = show._text_lines(prepare(file, processor, 0))
    assert [plain(line) for line in lines] == [
        "<|im_start|>system",
        "You are a helpful assistant.<|im_end|>",
        "<|im_start|>user",
        "<|vision_start|><|video_pad|> × 36 <|vision_end|>The ball costs $5 or $6?<|im_end|>",
        "<|im_start|>assistant",
        "The blue cup 小 🐶.<|im_end|>",
    ]
    assert ("ball", show.INK, show.COLOURS[0]) in lines[3]
    assert lines[5][:2] == [("The blue ", show.ANSWER, None), ("cup", show.ANSWER, show.COLOURS[1])]
    assert lines[3][-1] == ("<|im_end|>", show.FAINT, None) and lines[5][-1][1] == show.ANSWER


def test_rows_name_token_range_and_patches(file, processor):
    shown = prepare(file, processor, 0)
    (position, _, end, _), *_ = shown.sample.rows
    rows = [plain(line).split() for line in show._row_lines(shown)]
    assert rows[1] == ["0", "ball", str(position), "'", "ball'", "[0,", f"{end})", "1"]
    assert rows[2][:2] == ["1", "cup"] and rows[2][-2:] == ["1", "4"]
    assert plain(show._row_lines(prepare(file, processor, 1))[0]).startswith("no attention rows")


def test_headline(file, processor):
    length = len(prepare(file, processor, 0).sample.inputs["input_ids"])
    lines = [plain(line) for line in show._headline(prepare(file, processor, 0, max_tokens=length - 6))]
    assert lines[0] == "data.json, record 0 (two)"
    assert "96 × 64 pixels · 12 frames at 4 per second → " in lines[1]
    assert "patches of 2 × 3 visual tokens" in lines[1]
    assert lines[2].startswith("thinned from 12 to 10 frames: ")
    assert lines[3].startswith("trained on: answers and the attention of nouns")
    text = [plain(line) for line in show._headline(prepare(file, processor, 1))]
    assert text[1].startswith("text only · ") and text[2] == "trained on: answers"


def test_long_texts_are_wrapped_and_cut(file, processor):
    lines = show._text_lines(prepare(file, processor, 1))
    assert len(lines) == show.MOST_LINES + 1
    assert plain(lines[-1]).startswith("… ") and plain(lines[-1]).endswith(" more lines")
    assert max(show._columns(plain(line)) for line in lines) <= show.COLUMNS


def test_wrapping():
    words = "one two  three\n\n" + "x" * (2 * show.COLUMNS) + " end"
    lines = [plain(line) for line in show._wrapped([(words, show.INK, None)])]
    assert lines[:2] == ["one two  three", ""]
    assert "".join(lines[2:]) == "x" * (2 * show.COLUMNS) + " end"
    assert max(map(len, lines)) <= show.COLUMNS
    assert [plain(line) for line in show._wrapped([("小" * (show.COLUMNS // 2 * 2), show.INK, None)])] == [
        "小" * (show.COLUMNS // 2)
    ] * 2


@pytest.mark.parametrize("index", [5, -1])
def test_no_such_record(file, processor, tmp_path, index):
    with pytest.raises(DataError, match=f"data.json: there is no record {index}: the file has 5, counted from 0"):
        show_record(file, index, tmp_path / "a.png", processor)


def test_a_bad_record_is_named(file, processor, tmp_path):
    with pytest.raises(DataError, match=r"data.json, record 4 \(bad\), conversations\[0\]: <ins> is never closed"):
        show_record(file, 4, tmp_path / "record.png", processor)
    assert not (tmp_path / "record.png").exists()
