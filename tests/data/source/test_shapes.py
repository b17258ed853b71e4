"""Records of other projects' shapes: read as NL-Refer's, or refused by name."""

import json

import pytest

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile, Turn
from swim_fast.data.source.shapes import canonical
from swim_fast.options import Excerpt
from tests.helpers.record_files import MASK, make_entry

TURNS = [{"from": "human", "value": "A <ins>cub</ins>?"}, {"from": "gpt", "value": "Yes."}]
CHAT = [{"role": "user", "content": "A <ins>cub</ins>?"}, {"role": "assistant", "content": "Yes."}]
PLAIN = {"video": "a.mp4", "conversations": TURNS, "annotation": [{"3": MASK}]}
REST = {"video": "a.mp4", "annotation": [{"3": MASK}]}


def parts(*content):
    return [{"role": "user", "content": list(content)}, CHAT[1]]


@pytest.fixture
def read(tmp_path):
    def read(entry, **excerpt):
        path = tmp_path / "data.jsonl"
        path.write_text(entry if isinstance(entry, str) else json.dumps(entry))
        return RecordFile(path, excerpt=Excerpt(**excerpt))[0]

    return read


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": CHAT, **REST},
        {"conversation": TURNS, **REST},
        {"conversation": [{"human": "A <ins>cub</ins>?", "assistant": "Yes."}], **REST},
        {"query": "A <ins>cub</ins>?", "response": "Yes.", **REST},
        {"conversations": TURNS, "videos": ["a.mp4"], "annotation": REST["annotation"]},
        {"conversations": TURNS, "videos": "file://a.mp4", "annotation": REST["annotation"], "images": [], "image": ""},
        {"conversations": TURNS, "video": "a.mp4", "masks": REST["annotation"]},
        {"conversations": TURNS, "video": ["a.mp4"], "masks": REST["annotation"], "annotation": []},
        {"conversations": TURNS, "video": [{"path": "a.mp4"}], "annotation": REST["annotation"], "objects": ["cub"]},
    ],
)
def test_other_shapes_are_read_as_they_are(read, entry):
    assert read(entry) == read(PLAIN)


def test_a_record_in_its_own_shape_is_untouched():
    assert canonical(PLAIN) is PLAIN
    once = canonical({"messages": CHAT, **REST})
    assert canonical(once) is once


def test_content_parts_say_where_the_medium_goes(read):
    video = {"type": "video", "video": "a.mp4", "fps": 2.0}
    record = read({"messages": parts(video, {"type": "text", "text": "A <ins>cub</ins>?"}), "annotation": [{}]})
    assert record.turns[0] == Turn("user", "<video>A <ins>cub</ins>?") and record.media.name == "a.mp4"
    shown = {"messages": parts("Is", {"type": "image"}, {"text": "it?"}), "images": ["b.png"]}
    record = read(shown)
    assert (record.turns[0].text, record.kind, record.media.name) == ("Is<image>it?", "image", "b.png")


def test_system_and_history(read):
    entry = {"system": "Be brief.", "query": "c", "response": "d", "history": [["a", "b"]]}
    assert [(turn.role, turn.text) for turn in read(entry).turns] == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ]  # fmt: skip
    assert read({"system": "Be brief.", "conversations": TURNS[1:] * 2}).turns[0] == Turn("system", "Be brief.")


def test_masks_of_an_image_belong_to_its_only_frame(read):
    polygon = [[1, 1, 9, 1, 9, 9]]
    for key, mask in (("masks", MASK), ("masks", polygon), ("annotation", {"segmentation": polygon})):
        assert read({"conversations": TURNS, "image": "a.png", key: [mask]}).objects == ({0: mask},)
    assert read({"conversations": TURNS, "image": "a.png", "masks": [{"0": MASK}]}).objects == ({0: MASK},)


def test_the_size_to_which_polygons_refer(read):
    assert read({**PLAIN, "height": 720, "width": 1280}).mask_size == (720, 1280)
    assert read(PLAIN).mask_size is None
    assert read({**PLAIN, "height": "720"}, use_tags=False).mask_size is None  # without masks it does not matter


@pytest.mark.parametrize(
    ("entry", "key", "reason"),
    [
        ({**PLAIN, "messages": CHAT}, "messages", "has both conversations and messages"),
        ({**PLAIN, "videos": ["b.mp4"]}, "videos", "has both video and videos"),
        ({**PLAIN, "masks": [{"3": MASK}]}, "masks", "has both annotation and masks"),
        ({**PLAIN, "video": None, "videos": ["a.mp4", "b.mp4"]}, "video", "2 videos in one record"),
        ({**PLAIN, "images": ["b.png"]}, "video", "both a video and an image"),
        ({**PLAIN, "height": 720}, None, "height 720 and width None are no size in pixels"),
        ({**PLAIN, "height": 10**3000, "width": 1}, None, "are no size in pixels"),
        ({**PLAIN, "audio": "a.wav"}, "audio", "names media that would not be read"),
        ({"conversations": TURNS, "video_path": "a.mp4", "annotation": []}, "video_path", "names media that would not"),
        ({"conversations": TURNS, "clips": ["a.mp4"]}, "clips", "names media that would not be read"),
        ({**PLAIN, "annotation": [], "anotation": [{"3": MASK}]}, "anotation", "may hold masks that would not be read"),
        ({**PLAIN, "segmentation": MASK}, "segmentation", "may hold masks that would not be read"),
        ({**PLAIN, "bbox": [1, 2, 3, 4]}, "bbox", "may hold masks that would not be read"),
        ({**PLAIN, "objects": {"bbox": [[1, 2, 3, 4]]}}, "objects", "may hold masks that would not be read"),
        ({"messages": parts({"type": "audio", "audio": "a"})}, "messages[0].content[0]", "content of type 'audio'"),
        ({"messages": parts(17)}, "messages[0].content[0]", "content of type None is not supported"),
        ({"messages": parts({"video": "a", "video_start": 2})}, "messages[0].content[0]", "a part of a clip"),
        ({"messages": parts({"video": {"a": 1}}), "videos": ["a.mp4"]}, "video", "2 videos in one record"),
        ({"messages": [CHAT[0], {**CHAT[1], "loss": False}]}, "messages[1]", "is not to be trained on"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "conversations[0]", "unknown speaker \"from\": 'tool'"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "conversations[1]", '"value" is missing'),
        ({"query": "a", "history": ["b"]}, "history", "is no list of pairs"),
        ({"system": 3, "conversations": TURNS}, "system", "is no text"),
        ({"instruction": "a", "output": "b"}, "conversations", "is missing or empty; expected a list of"),
        (make_entry(0, conversations=[TURNS[0], {"from": "gpt", "value": " \n"}]), "conversations[1]", "is empty"),
        (make_entry(0, annotation=[]), "annotation", "has 1 <ins> tags but there are 0 annotations"),
        (make_entry(0, "A <ins>cub</ins> and <region>"), "conversations[0]", "the placeholder <region> beside <ins>"),
        (make_entry(0, "What is <region>?", annotation=..., video=...), "conversations", "raw VideoRefer record"),
        (make_entry(0, "What is <region1>?", annotation=..., masks=[MASK]), "conversations", "raw VideoRefer record"),
        (make_entry(0, video="a\0.mp4"), "video", "the path holds a NUL character"),
        (make_entry(0, video="a\ud800.mp4"), "video", "the path holds half a surrogate pair"),
        (make_entry(0, video="a" * 256), "video", "a path of 256 bytes is longer than file systems take"),
        (make_entry(0, video="a/" * 3000), "video", "a path of 6,000 bytes is longer"),
        ('{"video": "a.mp4", "video": "b.mp4"}', None, "the key 'video' occurs twice in one object"),
        ('{"annotation": [{"3": null, "3": null}]}', None, "the key '3' occurs twice in one object"),
    ],
)  # fmt: skip
def test_refused_by_name(read, entry, key, reason):
    with pytest.raises(DataError) as caught:
        read(entry)
    assert caught.value.key == key and reason in caught.value.reason and len(str(caught.value)) < 500


def test_without_tags_masks_of_any_shape_are_not_looked_at(read):
    entry = {**PLAIN, "bbox": [1, 2, 3, 4], "masks": [3]}
    assert read(entry, use_tags=False).objects == ()


def test_what_is_printed_has_no_control_sequences(read):
    with pytest.raises(DataError) as caught:
        read({"id": "\x1b[2J\ud800\n" + "n" * 9000, "conversations": []})
    assert str(caught.value).isprintable() and "(\\x1b[2J\\ud800\\nnnn" in str(caught.value)
    assert len(str(caught.value)) < 600 and read({**PLAIN, "id": "a\x07b"}).name == "a\\x07b"
