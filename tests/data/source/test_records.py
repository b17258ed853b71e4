import json
import pickle
from pathlib import Path

import pytest

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile, Turn
from swim_fast.options import Excerpt, Source
from tests.helpers.record_files import MASK, make_entry, names_of


def test_what_a_record_holds(tmp_path):
    entry = make_entry(3, conversations=[
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<video>\nWhat does the <ins>cub</ins> do?"},
        {"from": "gpt", "value": "It plays with the <ins>ball</ins>."},
    ], annotation=[{"36": {"segmentation": MASK}, "0052": {"segmentation": None}}, {"7": None}])  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([make_entry(0), entry]))
    assert RecordFile(str(tmp_path / "data.json"))[1] == Record(
        source=str(tmp_path / "data.json"),
        number=1,
        name="clip_3",
        turns=(
            Turn("system", "Be brief."),
            Turn("user", "<video>\nWhat does the <ins>cub</ins> do?"),
            Turn("assistant", "It plays with the <ins>ball</ins>."),
        ),
        kind="video",
        media=tmp_path / "clips/3.mp4",
        objects=({36: {"segmentation": MASK}, 52: {"segmentation": None}}, {7: None}),
    )


def _write(tmp_path, *entries):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


def test_media(tmp_path):
    def media(root=None, **changes):
        changes = {"annotation": ..., "conversations": [{"from": "human", "value": "Hi"}], "video": ..., **changes}
        record = RecordFile(_write(tmp_path, make_entry(0, **changes)), root)[0]
        return record.kind, record.media

    assert media(video="a.mp4") == ("video", tmp_path / "a.mp4")
    assert media("/data", video="b/a.mp4") == ("video", Path("/data/b/a.mp4"))
    assert media("/data", video="/other/a.mp4") == ("video", Path("/other/a.mp4"))
    assert media(image="a.jpg") == ("image", tmp_path / "a.jpg")
    assert media(image=["a.jpg"], video=None) == ("image", tmp_path / "a.jpg")
    for nothing in ({}, {"video": None}, {"video": ""}, {"video": None, "image": None}, {"image": []}):
        assert media(**nothing) == ("text", None)


def test_names_and_records_without_annotations(tmp_path):
    plain = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    file = RecordFile(_write(tmp_path, {**plain, "id": 17}, plain, {**plain, "annotation": None, "id": "a"},
                             {**plain, "annotation": [], "index": "b", "id": "c"}))  # fmt: skip
    assert [record.name for record in file] == ["17", "", "a", "b"]
    assert all(record.objects == () and record.kind == "text" for record in file)
    assert file[-1].name == "b" and file[-1].number == 3
    for number in (4, -5):
        with pytest.raises(IndexError, match=f"has 4 records, there is no number {number if number > 0 else -1}"):
            file[number]


TURN = {"from": "human", "value": "See <ins>a</ins>"}
PROBLEMS = {
    "no conversation": (make_entry(1, conversations=...), "conversations", "is missing or empty; expected a list of"),
    "empty conversation": (make_entry(1, conversations=[]), "conversations", "is missing or empty"),
    "conversation of another type": (
        make_entry(1, conversations="Hi"),
        "conversations",
        "is a str, not a list of turns",
    ),
    "turn of another type": (make_entry(1, conversations=[TURN, "Hi"]), "conversations[1]", "is not an object"),
    "unknown speaker": (
        make_entry(1, conversations=[TURN, {"from": "bot", "value": ""}]),
        "conversations[1]",
        "unknown speaker \"from\": 'bot'; known are human, user, gpt, assistant, system",
    ),
    "speaker of another type": (
        make_entry(1, conversations=[{"from": [], "value": ""}]),
        "conversations[0]",
        "unknown speaker",
    ),
    "late system turn": (
        make_entry(1, conversations=[TURN, {"from": "system", "value": ""}]),
        "conversations[1]",
        "a system turn is allowed only as the first",
    ),
    "no text": (make_entry(1, conversations=[{"from": "gpt"}]), "conversations[0]", '"value" is missing'),
    "text of another type": (
        make_entry(1, conversations=[{"from": "gpt", "value": 3}]),
        "conversations[0]",
        '"value" is no string',
    ),
    "half a surrogate pair": (
        make_entry(1, conversations=[{"from": "gpt", "value": "\ud83d"}]),
        "conversations[0]",
        '"value" holds half a surrogate pair',
    ),
    "video and image": (make_entry(1, image="a.jpg"), "video", "has both a video and an image"),
    "two videos": (make_entry(1, video=["a.mp4", "b.mp4"]), "video", "2 videos in one record; one is supported"),
    "video of another type": (make_entry(1, video={"file": "a.mp4"}), "video", "is not a path but dict"),
    "fewer annotations than tags": (
        make_entry(1, "<ins>a</ins> and <ins>b</ins>"),
        "annotation",
        "the conversation has 2 <ins> tags but there are 1 annotations; the i-th annotation belongs to the i-th tag",
    ),
    "more annotations than tags": (
        make_entry(1, annotation=[{}, {}]),
        "annotation",
        "has 1 <ins> tags but there are 2",
    ),
    "tags without annotations": (make_entry(1, annotation=...), "annotation", "has 1 <ins> tags but there are 0"),
    "annotations without tags": (make_entry(1, "the cub"), "annotation", "has 0 <ins> tags but there are 1"),
    "annotation of another type": (
        make_entry(1, annotation={"36": MASK}),
        "annotation",
        "is a dict, not a list with one entry",
    ),
    "object of another type": (make_entry(1, annotation=["36"]), "annotation[0]", "is a str, not an object"),
    "word for a frame number": (
        make_entry(1, annotation=[{"first": MASK}]),
        "annotation[0]['first']",
        "is not a frame number",
    ),
    "segmentation without frame": (
        make_entry(1, annotation=[{"segmentation": MASK}]),
        "annotation[0]['segmentation']",
        "is not a frame",
    ),
    "negative frame number": (make_entry(1, annotation=[{"-3": MASK}]), "annotation[0]['-3']", "is not a frame number"),
    "fraction of a frame": (make_entry(1, annotation=[{"1.5": MASK}]), "annotation[0]['1.5']", "is not a frame number"),
    "superscript for a number": (
        make_entry(1, annotation=[{"²": MASK}]),
        "annotation[0]['²']",
        "is not a frame number",
    ),
    "frame number twice": (
        make_entry(1, annotation=[{"36": MASK, "036": MASK}]),
        "annotation[0]['036']",
        "frame number 36 occurs twice",
    ),
    "masks of nothing": (make_entry(1, video=None), "annotation", "has masks but neither video nor image"),
    "raw VideoRefer": (
        make_entry(1, "What does <object1><region> do?"),
        "conversations",
        "raw VideoRefer record: its text holds <object…><region> placeholders instead of tagged nouns; turn the file",
    ),
    "raw VideoRefer, one object": (make_entry(1, "What does <region> do?"), "conversations", "raw VideoRefer record"),
    "raw VideoRefer without masks": (
        make_entry(1, "Does <object1> <region>?", annotation=[]),
        "conversations",
        "raw VideoRefer",
    ),
    "no object": ("[1, 2]", None, "is a JSON list, not an object with conversations"),
    "number": ("17", None, "is a JSON int"),
    "too deep": ("[" * 100_000 + "]" * 100_000, None, "malformed JSON"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_malformed_records_cost_themselves_alone(problem, tmp_path):
    entry, key, message = PROBLEMS[problem]
    path = _write(tmp_path, make_entry(0), entry, make_entry(2))
    file = RecordFile(path)
    assert names_of(file) == ["clip_0", None, "clip_2"]
    with pytest.raises(DataError) as caught:
        file[1]
    error = caught.value
    name = "clip_1" if isinstance(entry, dict) else ""
    assert (error.source, error.record, error.name, error.key) == (str(path), 1, name, key)
    where = f"{path}, record 1" + f" ({name})" * bool(name) + f", {key}" * bool(key) + ": "
    assert str(error).startswith(where) and message in error.reason
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_malformed_lines_say_where(tmp_path):
    good = json.dumps(make_entry(0, "Ünïcödé <ins>cub</ins>"), ensure_ascii=False)
    cut, words = good[: len(good) // 2], "this is not JSON"
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join((words, good, cut, "}{", good)), encoding="utf-8")
    file = RecordFile(path)
    assert names_of(file) == [None, "clip_0", None, None, "clip_0"]
    with pytest.raises(DataError, match=r"data.jsonl, record 0: malformed JSON at byte 0 of the file: Expecting value"):
        file[0]
    with pytest.raises(DataError, match=r"record 2: malformed JSON at byte (\d+) of the file: ") as caught:
        file[2]
    begin = len(f"{words}\n{good}\n".encode())
    assert begin < int(str(caught.value).split("byte ")[1].split()[0]) <= begin + len(cut.encode())


def test_text_that_is_not_utf8(tmp_path):
    line = json.dumps(make_entry(1, "Bär <ins>cub</ins>"), ensure_ascii=False).encode("latin-1")
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(make_entry(0)).encode() + b"\n" + line)
    place = path.read_bytes().index(b"\xe4")
    assert RecordFile(path)[0].name == "clip_0"
    with pytest.raises(DataError, match=f"record 1: is not UTF-8 at byte {place} of the file; save it as UTF-8"):
        RecordFile(path)[1]


CHAT = [
    ("system", "Be brief."),
    ("human", "<video>\nWhere is the <ins>cub</ins>?"),
    ("gpt", "By the <ins>ball</ins>."),
    ("human", "Which <ins>ball</ins>?"),
    ("human", "And why?"),
    ("gpt", "The red one."),
    ("human", "Bye."),
]


def _chat(tmp_path, **changes):
    turns = [{"from": role, "value": text} for role, text in CHAT]
    annotation = [{"0": {"segmentation": MASK}}, {}, {"7": {"segmentation": MASK}}]
    return _write(tmp_path, make_entry(0, conversations=turns, annotation=annotation, **changes))


@pytest.mark.parametrize(("turns", "kept", "frames"), [(1, 3, [0]), (2, 6, [0, 7]), (3, 7, [0, 7]), (9, 7, [0, 7])])
def test_only_the_first_exchanges(tmp_path, turns, kept, frames):
    path = _chat(tmp_path)
    whole, record = RecordFile(path)[0], RecordFile(path, excerpt=Excerpt(turns=turns))[0]
    assert record.turns == whole.turns[:kept]
    assert record.objects == whole.objects[: len(record.objects)]
    assert [frame for segmentations in record.objects for frame in segmentations] == frames
    assert len(record.objects) == sum(turn.text.count("<ins>") for turn in record.turns)


def test_without_tags_a_record_is_text_and_its_masks_are_not_read(tmp_path):
    path = _chat(tmp_path)
    whole, record = RecordFile(path)[0], RecordFile(path, excerpt=Excerpt(use_tags=False))[0]
    assert [turn.text for turn in record.turns] == [text.replace("<ins>", "").replace("</ins>", "") for _, text in CHAT]
    assert record.objects == () and (record.kind, record.media, record.name) == (whole.kind, whole.media, whole.name)
    unread = [{"no frame": 3}, "nothing of use"]
    broken = _write(tmp_path, make_entry(0, annotation=unread), make_entry(1, annotation=...))
    assert all(record.objects == () for record in RecordFile(broken, excerpt=Excerpt(use_tags=False)))
    first = Excerpt(use_tags=False, turns=1)
    assert RecordFile(_chat(tmp_path), excerpt=first)[0].turns[-1] == Turn("assistant", "By the ball.")


def test_without_tags_bad_text_is_still_refused(tmp_path):
    def problem(text, **changes):
        turns = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": text}]
        path = _write(tmp_path, make_entry(0, conversations=turns, **changes))
        with pytest.raises(DataError) as error:
            RecordFile(path, excerpt=Excerpt(use_tags=False))[0]
        return str(error.value)

    assert "record 0 (clip_0), conversations[1]: <ins> is never closed" in problem("a <ins>cub")
    assert "this is a raw VideoRefer record" in problem("<object1><region> runs")
    assert "this is a raw VideoRefer record" in problem("the <region> runs")


def test_the_records_of_a_source(tmp_path):
    source = Source(path=str(_chat(tmp_path)), media="/media", turns=1, use_tags=False)
    records = RecordFile.from_source(source)
    assert records.excerpt == Excerpt(turns=1, use_tags=False) and records.media_root == Path("/media")
    assert len(records[0].turns) == 3 and pickle.loads(pickle.dumps(records))[0] == records[0]
