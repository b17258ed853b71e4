"""What is shown of a record, by value, and the files that `data show` writes."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from swim_fast.cli import main
from swim_fast.data.show import show_record, view_record
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile
from swim_fast.errors import UserError
from swim_fast.jobs import Show
from swim_fast.viz.record import COLOURS
from tests.data.conftest import box, builder_of, rle

H, W = 64, 96


@pytest.fixture
def file(tmp_path, clip):
    """A video with two nouns, a text, an image, a video of odd length, a broken record, a damaged mask."""
    Image.new("RGB", (W, H)).save(tmp_path / "a.png")
    ball, cup = box(H, W, 0, 20, 0, 30), box(H, W, 30, 60, 50, 90)

    def entry(name, *texts, **fields):
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"id": name, "conversations": turns, **fields}

    annotation = [{"3": rle(ball), "7": None}, {"3": rle(cup), "9": rle(cup)}]
    two = "<video>\nThe <ins>ball</ins> costs $5 or $6?", "The blue <ins>cup</ins> 小 🐶."
    ball_upright = [{"2": rle(ball.T.copy())}]
    damaged = [{"1": rle(ball), "5": {"size": [H, W], "counts": [1]}, "9": rle(ball)}]
    entries = [
        entry("two", *two, video=str(clip(12)), annotation=annotation),
        entry("text", "What?", "This. " * 2000),
        entry("image", "A <ins>ball</ins>?", "Yes.", image="a.png", annotation=[{"0": rle(ball)}]),
        entry("odd", "A <ins>ball</ins>?", "Yes.", video=str(clip(3, 4, 96, 64)), annotation=ball_upright),
        entry("bad", "A <ins>ball?", "Yes.", video="missing.mp4", annotation=[{}]),
        entry("damaged", "A <ins>ball</ins>?", "Yes.", video=str(clip(12)), annotation=damaged),
        entry("unseen", "A <ins>ball</ins>?", "Yes.", video=str(clip(12)), annotation=[{"3": None}]),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return path


def view(file, processor, index, **options):
    builder = builder_of(processor, **options)
    found = view_record(RecordFile(file)[index], builder)
    builder.reader.close()
    return found


def show(file, index, out, processor, **options):
    return show_record(Show(file=file, index=index, model="", out=out, **options), processor)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_page_is_written_without_matplotlib(file, processor, tmp_path, index, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it would fail
    out = show(file, index, tmp_path / "new" / "record.html", processor, max_frames=6)
    assert out == tmp_path / "new" / "record.html"
    page = out.read_text("utf-8")
    assert not re.search(r"(src|href|url|import)\W{0,3}(https?:|//|file:)", page)
    assert page.count("data:image/jpeg;base64,") == (6, 0, 1, 4)[index]
    assert ('<mark class="n0' in page) == (index != 1)


@pytest.mark.parametrize("index", [0, 2])
def test_frames_are_drawn_into_a_png_without_pyplot(file, processor, tmp_path, index, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with Image.open(show(file, index, tmp_path / "record.PNG", processor)) as picture:
        assert picture.format == "PNG" and picture.width > 256
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels - COLOURS[0]).max(-1).min() < 30, "an outline in the noun's colour, scaled to the panel"


@pytest.mark.parametrize(
    ("index", "out", "message"),
    [
        (0, "record.pdf", r"out is '.*record.pdf'; it must end in .html \(the whole record\) or .png \(its frames\)"),
        (0, "record", "it must end in .html"),
        (1, "record.png", "the record has no frames to draw: let it end in .html"),
    ],
)
def test_other_files_are_refused(file, processor, tmp_path, index, out, message):
    with pytest.raises(UserError, match=message):
        show(file, index, tmp_path / out, processor)
    assert not (tmp_path / out).exists()


def test_masks_are_those_of_the_frames(file, processor):
    found = view(file, processor, 0)
    frames = [frame for patch in found.patches for frame in patch.frames]
    assert len(frames) == 12 and all(frame.image.shape == (H, W, 3) for frame in frames)
    assert {i: sorted(frame.masks) for i, frame in enumerate(frames) if frame.masks} == {3: [0, 1], 9: [1]}
    assert np.array_equal(frames[3].masks[0], box(H, W, 0, 20, 0, 30))
    assert frames[3].label == "frame 3, 0.75 s"
    repeated = view(file, processor, 3).patches[-1].frames
    assert [frame.label for frame in repeated] == ["frame 2, 0.50 s", "frame 2, 0.50 s (repeated)"]


def test_supervised_patches(file, processor):
    found = view(file, processor, 0)
    first = next(i for i, token in enumerate(found.tokens) if token.role == "visual")
    assert tuple(found.grid) == (2, 3)
    assert [patch.nouns for patch in found.patches] == [[], [0, 1], [], [], [1], []]
    assert found.patches[1].tokens == f"{first + 6} to {first + 11}"
    assert found.nouns == ["ball", "cup"]


def test_text_is_shown_as_the_model_reads_it(file, processor):
    pieces = view(file, processor, 0).text
    assert "".join(piece.text for piece in pieces).splitlines() == [
        "<|im_start|>system",
        "You are a helpful assistant.<|im_end|>",
        "<|im_start|>user",
        "<|vision_start|>36 visual tokens<|vision_end|>The ball costs $5 or $6?<|im_end|>",
        "<|im_start|>assistant",
        "The blue cup 小 🐶.<|im_end|>",
    ]
    assert [(p.text, p.role) for p in pieces if p.noun is not None] == [("ball", ""), ("cup", "answer")]
    assert [p.text for p in pieces if p.role == "answer"] == ["The blue ", "cup", " 小 🐶.<|im_end|>"]
    assert {p.text for p in pieces if p.role == "special"} == {
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
    }


def test_tokens_and_their_roles(file, processor):
    found = view(file, processor, 0)
    visual = [token for token in found.tokens if token.role == "visual"]
    assert [token.text for token in visual] == ["36 visual tokens"]
    (first, last) = map(int, visual[0].position.split(" to "))
    assert last - first == 35
    positions = [token.position for token in found.tokens]
    assert positions[:2] == ["0", "1"] and positions[positions.index(visual[0].position) + 1] == str(last + 1)
    labels = "".join(token.text for token in found.tokens if token.role == "label")
    assert labels.startswith("The blue cup ") and labels.endswith(".<|im_end|>")
    assert found.tokens[0].role == "special"
    nouns = {token.position: token.noun for token in found.tokens if token.noun is not None}
    assert nouns == {str(position): noun for noun, _, position, *_ in found.rows}


def test_rows_name_token_range_and_patches(file, processor):
    found = view(file, processor, 0)
    (noun, token, position, softmax, patches), second, *_ = found.rows
    assert (noun, token, softmax, patches) == (0, " ball", found.patches[1].tokens, [1])
    assert position == int(found.rows[0][2]) and second[0] == 1
    assert second[-2:] == ("of each patch by itself", [1, 4])
    assert view(file, processor, 1).rows == []


def test_facts_and_notes(file, processor):
    found = view(file, processor, 0)
    facts = {name: (value, detail) for name, value, detail in found.facts}
    assert found.title == "data.json, record 0 (two)" and found.notes == []
    assert facts["video"][1] == "96 × 64 pixels, 12 frames at 4 per second"
    assert facts["visual tokens"] == ("36", "2 × 3 in each patch")
    assert facts["frames taken"] == ("12", "in 6 temporal patches, 0.5 s apart")
    thinned = view(file, processor, 0, max_tokens=int(facts["tokens"][0]) - 6)
    assert thinned.notes[0].startswith("thinned from 12 to 10 frames: ")
    assert [name for name, *_ in view(file, processor, 1).facts] == ["tokens"]
    assert [name for name, *_ in view(file, processor, 2).facts] == [
        "image",
        "visual tokens",
        "tokens",
        "attention rows",
    ]
    assert view(file, processor, 6).notes == ["“ball” has no mask in these frames: its attention is not trained"]


def test_the_part_of_the_record_that_is_used_is_shown(file, processor, tmp_path):
    out = show(file, 0, tmp_path / "a.html", processor, use_tags=False, system_prompt="Look closely.")
    page = out.read_text("utf-8")
    assert "Look closely." in page and "You are a helpful assistant." not in page
    assert '<mark class="n0' not in page and "tagged nouns: 0" in page


def test_labels_and_supervision_are_those_asked_for(file, processor, tmp_path):
    found = view(file, processor, 0, supervise="second", label_header=True)
    assert [patch.nouns for patch in found.patches] == [[], [0, 1], [], [], [1], []]  # frames 3 and 9
    labels = "".join(token.text for token in found.tokens if token.role == "label")
    assert labels.startswith("<|im_start|>assistant\nThe blue cup ")
    answer = "".join(piece.text for piece in found.text if piece.role == "answer")
    assert answer == "<|im_start|>assistant\nThe blue cup 小 🐶.<|im_end|>"
    page = show(file, 0, tmp_path / "a.html", processor, supervise="second", label_header=True).read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == 12


def test_a_noun_without_a_mask_in_a_second_frame_is_noted(file, processor):
    found = view(file, processor, 3, supervise="second")  # of 0, 1, 2, 2 the last
    assert [patch.nouns for patch in found.patches] == [[], [0]]
    found = view(file, processor, 0, supervise="second", max_frames=2)
    assert found.notes == ["“ball” has no mask in the second frame of a patch: its attention is not trained"]


def test_a_damaged_mask_in_a_frame_that_is_not_taken_is_refused_as_in_training(file, processor):
    with pytest.raises(DataError, match=r"\(damaged\), annotation\[0\]\['5'\]: run-length code does not decode"):
        view(file, processor, 5, max_frames=2)


@pytest.mark.parametrize("index", [7, -1])
def test_no_such_record(file, processor, tmp_path, index):
    with pytest.raises(DataError, match=f"data.json: there is no record {index}: the file has 7, counted from 0"):
        show(file, index, tmp_path / "a.html", processor)


def test_a_bad_record_is_named(file, processor, tmp_path):
    with pytest.raises(DataError, match=r"data.json, record 4 \(bad\), conversations\[0\]: <ins> is never closed"):
        show(file, 4, tmp_path / "record.html", processor)
    assert not (tmp_path / "record.html").exists()


def test_command(file, processor, tmp_path, monkeypatch, capsys):
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", str(file), "0", "--model", "model"]) == 0
    assert capsys.readouterr().out == "record.html\n" and (tmp_path / "record.html").is_file()
    assert main(["data", "show", str(file), "0", "--model", "model", "--out", "a.svg"]) == 2
