"""Referring expressions: Ref-YouTube-VOS, MeViS, ReVOS."""

import pytest

from swim_fast.data.source.errors import DataError
from swim_fast.importing.naming import name_category, name_expression
from tests.importing.conftest import assert_masks, box, rle, write_frames, write_json, write_palette

DOG, CAT = box(0, 10, 0, 20), box(20, 40, 30, 60)


def write_meta(path, expressions, frames=("00000", "00005", "00010")):
    return write_json(path, {"videos": {"0a1": {"expressions": expressions, "frames": list(frames)}}})


def test_ref_youtube_vos(tmp_path, run):
    root = tmp_path / "ref-youtube-vos"
    write_frames(root / "train/JPEGImages/0a1", ["00000.jpg", "00005.jpg", "00010.jpg"])
    for name in ("00000", "00010"):
        write_palette(root / f"train/Annotations/0a1/{name}.png", DOG + 2 * CAT)
    expressions = {
        "0": {"exp": "a brown dog on the left running", "obj_id": "1"},
        "1": {"exp": "The cat is sleeping on a chair.", "obj_id": "2"},
    }
    write_meta(root / "meta_expressions/train/meta_expressions.json", expressions)
    report, records = run("ref-youtube-vos", root)
    assert [record.name for record in records] == ["0a1_0", "0a1_1"] and report.counts["problems"] == 0
    assert_masks(records[0], {0: DOG, 2: DOG})
    assert_masks(records[1], {0: CAT, 2: CAT})
    question, answer = (turn.text for turn in records[0].turns)
    assert "a brown <ins>dog</ins> on the left running" in question
    assert "a brown dog on the left running" in answer
    question, answer = (turn.text for turn in records[1].turns)
    assert "that the <ins>cat</ins> is sleeping on a chair?" in question  # a sentence is asked about as one


@pytest.fixture
def mevis(tmp_path):
    """Frames 0, 5, 10 with objects 7 and 8; folder "train" as it is unpacked."""
    root = tmp_path / "mevis/train"
    write_frames(root / "JPEGImages/0a1", ["00000.jpg", "00005.jpg", "00010.jpg"])
    write_json(root / "mask_dict.json", {"7": [rle(DOG), None, rle(DOG)], "8": [None, rle(CAT), rle(CAT)]})
    return root


def test_mevis(mevis, run):
    expressions = {
        "0": {"exp": "the dog walking away", "obj_id": [0], "anno_id": [7]},
        "1": {"exp": "two animals playing", "obj_id": [0, 1], "anno_id": [7, 8]},
    }
    write_meta(mevis / "meta_expressions.json", expressions)
    _, records = run("mevis", mevis)
    assert_masks(records[0], {0: DOG, 2: DOG})
    assert_masks(records[1], {0: DOG, 1: CAT, 2: DOG | CAT})  # several objects: their union
    assert "two <ins>animals</ins> playing" in records[1].turns[0].text


def test_what_cannot_be_tagged_or_has_no_object(mevis, run):
    expressions = {
        "0": {"exp": "the dog and the cat", "obj_id": [0], "anno_id": [7]},
        "1": {"exp": "the bird flying", "obj_id": [], "anno_id": []},
        "2": {"exp": "the bird flying", "obj_id": [2], "anno_id": [9]},
        "3": {"exp": "the dog walking", "obj_id": [0], "anno_id": [7]},
        "4": {"expression": "a dog"},
    }
    write_meta(mevis / "meta_expressions.json", expressions)
    report, (record,) = run("mevis", mevis)
    assert record.name == "0a1_3"
    problems = [str(problem) for problem in report.problems]
    assert "0a1, expression 0: 'the dog and the cat' does not clearly name one object" in problems[0]
    assert "expression 1: has no object with a mask" in problems[1]
    assert "mask_dict.json: 9: is missing" in problems[2]
    assert "exp: is missing, expected a str; it has expression" in problems[3]


def test_masks_of_other_frames_are_refused(mevis, run):
    write_meta(mevis / "meta_expressions.json", {"0": {"exp": "a dog", "anno_id": [7]}}, frames=["00000", "00005"])
    with pytest.raises(DataError, match="mask_dict.json: 7: has 3 codes for the 2 frames of the clip"):
        run("mevis", mevis)
    write_meta(mevis / "meta_expressions.json", {"0": {"exp": "a dog", "anno_id": [7]}}, frames=["0", "5", "10"])
    with pytest.raises(DataError, match="has no frame '0'; a mask is named as its frame is"):
        run("mevis", mevis)


def test_a_question_needs_an_answer(mevis, run):
    """ReVOS asks, and answers with a mask alone; FeVOS has answers."""
    questions = {
        "0": {"exp": "Which dog walks away?", "type_id": 1, "obj_id": [0], "anno_id": [7]},
        "1": {"exp": "Which cat is left behind?", "obj_id": [1], "anno_id": [8], "ans": "The one on the chair."},
    }
    path = write_meta(mevis / "meta_expressions_train_.json", questions)
    report, (record,) = run("revos", path)
    assert "expression 0" not in record.name and record.turns[1].text == "The one on the chair."
    assert record.turns[0].text == "<video>\nWhich <ins>cat</ins> is left behind?"
    assert "is a question, and the source has no answer to it" in str(report.problems[0])
    _, (first, _) = run("revos", path, answer=["It is marked in the video."])
    assert [turn.text for turn in first.turns] == [
        "<video>\nWhich <ins>dog</ins> walks away?",
        "It is marked in the video.",
    ]


def test_the_file_is_named_where_there_are_several(mevis, run):
    for name in ("meta_expressions_train_.json", "meta_expressions_valid_.json"):
        write_meta(mevis / name, {})
    with pytest.raises(DataError, match=r"meta_expressions_valid_\.json; name one of these files"):
        run("revos", mevis)


@pytest.mark.parametrize(
    ("text", "tagged", "form"),
    [
        ("man riding a horse", "the <ins>man</ins> riding a horse", "phrase"),
        ("Dogs playing", "the <ins>dogs</ins> playing", "phrase"),
        ("One cat climbing up", "one <ins>cat</ins> climbing up", "phrase"),
        ("the rabbit that is leading", "the <ins>rabbit</ins> that is leading", "phrase"),
        ("The rabbit is leading.", "the <ins>rabbit</ins> is leading", "clause"),
        ("a person's hand", "a person's <ins>hand</ins>", "phrase"),
        ("the <ins>left</ins> one", "the <ins>left</ins> one", "phrase"),
    ],
)
def test_expressions(text, tagged, form):
    name = name_expression(text)
    assert (name.tagged, name.form) == (tagged, form)


@pytest.mark.parametrize(
    ("text", "several", "tagged"),
    [
        ("person", False, "the <ins>person</ins>"),
        ("person", True, "the <ins>people</ins>"),
        ("Potted_plant", True, "the potted <ins>plants</ins>"),
        ("a stop sign", False, "the stop <ins>sign</ins>"),
        ("ball_(toy)", False, "the <ins>ball</ins>"),
        ("SUV", False, "the <ins>SUV</ins>"),
    ],
)
def test_categories(text, several, tagged):
    assert name_category(text, several).tagged == tagged


def test_no_category():
    for text in ("1", "", "<region>"):
        with pytest.raises(DataError, match="is no name of an object"):
            name_category(text)
