"""VideoRefer, PixelRefer, ms-swift and LLaMA-Factory."""

import pytest
from PIL import Image

from swim_fast.cli import main
from tests.importing.conftest import H, W, assert_masks, box, rle, write_json

DOG, CAT = box(0, 10, 0, 20), box(20, 40, 30, 60)
DOG_POLYGON = [[0, 0, 20, 0, 20, 10, 0, 10]]


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path, write_video):
    write_video(tmp_path / "clips/a.mp4", 6)
    Image.new("RGB", (W, H)).save(tmp_path / "clips/a.png")
    return tmp_path


def test_videorefer(folder, run):
    entry = {"index": "v1", "video": "clips/a.mp4", "annotation": [{"2": {"segmentation": rle(DOG)}}]}
    entry["conversations"] = turns("<video>\nWhat is <object1><region> doing?", "The brown dog is running.")
    _, (record,) = run("videorefer", write_json(folder / "a.json", [entry]))
    assert record.turns[0].text == "<video>\nWhat is the brown <ins>dog</ins> doing?"
    assert_masks(record, {2: DOG})


def test_pixelrefer_of_a_video(folder, run):
    entry = {"id": 7, "video": ["clips/a.mp4"], "masks": [{"1": rle(DOG), "5": DOG_POLYGON}], "height": H, "width": W}
    entry["conversations"] = turns("<video>\nDescribe <region> in the video.", "A small dog runs to the left.")
    _, (record,) = run("pixelrefer", write_json(folder / "a.json", [entry]))
    assert "the small <ins>dog</ins>" in record.turns[0].text and record.name == "7"
    assert_masks(record, {1: DOG, 5: DOG})


def test_pixelrefer_of_an_image(folder, run):
    """Polygons are in pixels of the record's own size, here half of the image's."""
    entry = {"image": "clips/a.png", "masks": [DOG_POLYGON, rle(CAT)], "height": H // 2, "width": W // 2}
    entry["conversations"] = turns("<image>\nWhat is <region>?", "A dog.", "And what is <region>?", "A cat.")
    _, (record,) = run("pixelrefer", write_json(folder / "a.json", [entry]))
    assert record.kind == "image" and record.mask_size == (H // 2, W // 2)
    assert_masks(record, {0: CAT}, tag=1)


def test_what_the_rules_cannot_name_is_left_out(folder, run):
    entry = {
        "video": "clips/a.mp4",
        "masks": [{"1": rle(DOG)}],
        "conversations": turns("What does <region> do?", "It runs."),
    }
    good = {"video": "clips/a.mp4", "conversations": turns("<video>\nWhat is it?", "A dog.")}
    path = write_json(folder / "a.json", [entry, good])
    report, (record,) = run("pixelrefer", path)
    assert record.turns[1].text == "A dog."
    assert "record 0, conversations: no sentence of the answer clearly names" in str(report.problems[0])
    assert "swim-fast nl-refer build --rewriter openai" in str(report.problems[0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"video": ["a.mp4", "b.mp4"]}, "2 videos in one record; one is supported"),
        ({"video": "clips/b.mp4"}, "b.mp4 does not exist; name the folder that it is in with --media"),
        ({"image": "clips/a.png"}, "both a video and an image"),
        ({"masks": {"1": {}}}, "cannot be bound to 0 annotations"),
        ({"masks": []}, "cannot be bound to 0 annotations"),
    ],
)
def test_videorefer_mistakes_are_named(folder, run, changes, reason):
    entry = {"video": "clips/a.mp4", "masks": [{"1": rle(DOG)}]}
    entry["conversations"] = turns("What is <region>?", "A dog.")
    report, _ = run("pixelrefer", write_json(folder / "a.json", [entry, entry | changes]))
    assert reason in str(report.problems[0]) and report.problems[0].record == 1


USER, ANSWER, SYSTEM = "<video>What is it?", "A dog.", "Be brief."
SWIFT = {
    "messages": {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]},
    "sharegpt": {"system": SYSTEM, "conversation": [{"human": USER, "assistant": ANSWER}]},
    "alpaca": {"system": SYSTEM, "instruction": "<video>What", "input": "is it?", "output": ANSWER},
    "query": {"system": SYSTEM, "query": USER, "response": ANSWER, "history": []},
}
SWIFT["messages"]["messages"].append({"role": "assistant", "content": ANSWER})


@pytest.mark.parametrize("form", SWIFT)
def test_ms_swift(folder, run, form):
    entry = SWIFT[form] | {"videos": [str(folder / "clips/a.mp4")]}
    _, (record,) = run("ms-swift", write_json(folder / "a.json", [entry]))
    question = "<video>What\nis it?" if form == "alpaca" else USER
    assert [(turn.role, turn.text) for turn in record.turns] == [
        ("system", SYSTEM),
        ("user", question),
        ("assistant", ANSWER),
    ]
    assert record.kind == "video" and record.media == folder / "clips/a.mp4"


def test_ms_swift_history_and_parts(folder, run):
    parts = [{"type": "video", "video": "clips/a.mp4"}, {"type": "text", "text": "What is it?"}]
    entries = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]},
        {"query": "And that?", "response": "A cat.", "history": [["What is it?", ANSWER]]},
    ]
    _, (first, second) = run("ms-swift", write_json(folder / "a.json", entries))
    assert first.turns[0].text == "<video>What is it?" and first.media.name == "a.mp4"
    assert [turn.text for turn in second.turns] == ["What is it?", ANSWER, "And that?", "A cat."]


def test_llama_factory_as_its_description_says(folder, run):
    description = {
        "file_name": "mine.json",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog", "videos": "clip"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "you"},
    }
    write_json(folder / "dataset_info.json", {"other": {"file_name": "other.json"}, "mine": description})
    entry = {"dialog": [{"who": "me", "says": USER}, {"who": "you", "says": ANSWER}], "clip": ["clips/a.mp4"]}
    _, (record,) = run("llama-factory", write_json(folder / "mine.json", [entry]))
    assert [turn.text for turn in record.turns] == [USER, ANSWER] and record.kind == "video"
    sharegpt = {"conversations": turns(USER, ANSWER), "videos": ["clips/a.mp4"]}
    _, (record,) = run("llama-factory", write_json(folder / "plain.json", [sharegpt]))
    assert [turn.text for turn in record.turns] == [USER, ANSWER]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objects": {"ref": ["a dog"], "bbox": [[0, 0, 9, 9]]}}, "objects: has boxes, which are no masks"),
        ({"rejected_response": "No."}, "rejected_response: is preference data"),
        ({"images": ["clips/a.png", "clips/a.png"], "videos": []}, "2 images in one record; one is supported"),
        ({"messages": [{"role": "tool", "content": "x"}]}, """unknown speaker "from": 'tool'"""),
        ({"messages": [{"role": "user", "content": USER}]}, "has no answer to train on"),
        ({"messages": [{"role": "user", "content": 3}]}, '"value" is no string'),
        ({"messages": None}, "conversations: is missing or empty"),
    ],
)
def test_swift_mistakes_are_named(folder, run, changes, reason):
    entry = SWIFT["messages"] | {"videos": ["clips/a.mp4"]}
    report, records = run("ms-swift", write_json(folder / "a.json", [entry, entry | changes]))
    assert len(records) == 1 and reason in str(report.problems[0]) and report.problems[0].record == 1


def test_the_command(folder, capsys):
    path = write_json(folder / "a.json", [SWIFT["query"] | {"videos": ["clips/a.mp4"]}, {"query": "?"}])
    out = folder / "out.jsonl"
    assert main(["data", "import", "ms-swift", str(path), str(out)]) == 0
    printed = capsys.readouterr()
    assert f"2 clips, images or records of {path}" in printed.out and "1 left out" in printed.out
    assert printed.err == ""  # a short job needs no bar in a file
    assert main(["data", "check", str(out), "--workers", "0"]) == 0
    assert main(["data", "import", "ms-swift", str(path), str(path)]) == 2
    assert "is the input as well" in capsys.readouterr().err
    assert main(["data", "import", "ms-swift", str(path), str(out), "--question", "Where?"]) == 2
    assert "--question must have the word name in braces once" in capsys.readouterr().err
    assert main(["data", "import", "swift", str(path), str(out)]) == 2
    assert "format is 'swift'; choose one of" in capsys.readouterr().err
