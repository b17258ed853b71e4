import json
import sys

import numpy as np
import pytest
from PIL import Image

from swim_fast.data.check import check_file
from swim_fast.data.sample.media import MediaReader
from swim_fast.data.source.errors import DataError
from swim_fast.jobs import Check
from tests.data.conftest import box, rle
from tests.data.video.test_crosscheck import uncoded
from tests.data.video.test_displayed_frames import edited

H, W = 64, 96


def entry(name, question, answer="Yes.", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **fields}


@pytest.fixture
def file(tmp_path, clip):
    """A file with good records of every kind and one of each problem."""
    Image.new("RGB", (W, H)).save(tmp_path / "a.png")
    (tmp_path / "broken.mp4").write_bytes(clip(12).read_bytes()[:400])
    good, video = rle(box(H, W, 0, 20, 0, 30)), str(clip(12))
    small = rle(box(H, H, 0, 20, 0, 30))
    damaged = {"size": [H, W], "counts": [1, 2, 3]}
    entries = [
        entry(
            "good", "A <ins>dog</ins>, a <ins>cat</ins>", video=video, annotation=[{"3": good, "5": good}, {"5": good}]
        ),
        entry("text", "What?"),
        entry("image", "<image>\nA <ins>dog</ins>?", image="a.png", annotation=[{"0": good}]),
        entry("no mask", "A <ins>dog</ins>?", video=video, annotation=[{"0": None}]),
        entry("broken clip", "A <ins>dog</ins>?", video="broken.mp4", annotation=[{"0": good}]),
        "not json",
        entry("tags", "A dog?", video=video, annotation=[{"3": good}]),
        entry(
            "masks", "A <ins>dog</ins>?", video=video, annotation=[{"3": small, "4": good, "5": damaged, "12": good}]
        ),
        entry("special", "See <|im_end|>", video=video),
        entry("open tag", "A <ins>dog?", video=video, annotation=[{"4": good}]),
        entry("missing clip", "What?", video="missing.mp4"),
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return str(path)


COUNTS = {"records": 11, "video": 7, "image": 1, "text": 1, "with_tags": 6, "tags": 7}


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_is_counted_and_every_problem_found(file, processor, workers):
    report = check_file(Check(file=file, max_frames=4, workers=workers), processor, progress=False)
    assert report.counts == {**COUNTS, "usable": 4, "annotated_frames": 5, "masks": 6, "tags_without_mask": 1}
    found = [(problem.record, problem.name, problem.kind, problem.key) for problem in report.problems]
    assert found == [
        (4, "broken clip", "video", "video"),
        (5, "", "record", ""),
        (6, "tags", "annotation", "annotation"),
        (7, "masks", "annotation", "annotation[0]['3']"),
        (7, "masks", "annotation", "annotation[0]['5']"),
        (7, "masks", "annotation", "annotation[0]['12']"),
        (8, "special", "conversations", "conversations[0]"),
        (9, "open tag", "conversations", "conversations[0]"),
        (10, "missing clip", "video", "video"),
    ]
    reasons = [problem.reason for problem in report.problems]
    expected = [
        "video ",
        "malformed JSON",
        "the conversation has 0 <ins> tags but there are 1 annotations",
        "mask size 64 x 64 does not fit the video's 64 x 96",
        "run-length code does not decode",
        "frame number past the end: the video has 12 frames",
        "the text holds '<|im_end|>'",
        "<ins> is never closed",
        "video ",
    ]
    assert [reason[: len(start)] for reason, start in zip(reasons, expected, strict=True)] == expected
    assert "broken.mp4" in reasons[0] and "missing.mp4" in reasons[-1]
    assert report.by_kind() == {"annotation": 4, "video": 2, "conversations": 2, "record": 1}


def test_without_a_processor_the_text_is_checked_for_tags_alone(file):
    report = check_file(Check(file=file, max_frames=4, workers=0), progress=False)
    assert report.counts == {**COUNTS, "usable": 5, "annotated_frames": 5, "masks": 6, "tags_without_mask": 1}
    assert [problem.record for problem in report.problems] == [4, 5, 6, 7, 7, 7, 9, 10]
    assert report.tokens is None


@pytest.mark.parametrize("with_processor", [True, False])
def test_without_decoding(file, processor, with_processor, monkeypatch):
    monkeypatch.setattr("swim_fast.data.video.reader._Child", None)  # would be a TypeError
    report = check_file(
        Check(file=file, decode=False, workers=0), processor=processor if with_processor else None, progress=False
    )
    found = [(problem.record, problem.key) for problem in report.problems]
    special = [(8, "conversations[0]")] if with_processor else []
    assert found == [
        (5, ""),
        (6, "annotation"),
        (7, "annotation[0]['5']"),  # whether the others fit the video is not known
        *special,
        (9, "conversations[0]"),
        (10, "video"),
    ]
    assert report.problems[-1].reason.endswith("missing.mp4 does not exist; correct the path or the media folder")
    assert report.counts["video"] == COUNTS["video"]


def test_clips_are_decoded_for_real(tmp_path, clip, processor):
    """The header is whole, the frames are not."""
    data = bytearray(clip(12).read_bytes())
    start = data.index(b"mdat") + 8
    data[start : start + 6000] = np.random.default_rng(0).bytes(min(6000, len(data) - start))
    (tmp_path / "damaged.mp4").write_bytes(data)
    (tmp_path / "a.json").write_text(json.dumps([entry("x", "What?", video="damaged.mp4")]))
    for model in (None, processor):
        report = check_file(Check(file=str(tmp_path / "a.json"), workers=0), processor=model, progress=False)
        assert [problem.kind for problem in report.problems] == ["video"]


def test_tokens_and_thinning(tmp_path, clip, processor):
    entries = [entry("a", "What?", video=str(clip(12))), entry("b", "What?")]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    free = check_file(Check(file=str(tmp_path / "a.json"), workers=0), processor, progress=False)
    assert free.tokens["most"] == free.tokens["fewest"] + 6 * 6 + 2
    assert free.tokens["mean"] == (free.tokens["most"] + free.tokens["fewest"]) / 2
    assert free.tokens["thinned"] == 0
    options = dict(max_tokens=int(free.tokens["most"]) - 10)
    report = check_file(Check(file=str(tmp_path / "a.json"), **options, workers=0), processor, progress=False)
    assert report.tokens["thinned"] == 1
    assert "; 1 with fewer or smaller frames to fit" in str(report)
    options = dict(max_tokens=int(free.tokens["fewest"]))
    report = check_file(Check(file=str(tmp_path / "a.json"), **options, workers=0), processor, progress=False)
    assert [problem.reason.split(":")[0] for problem in report.problems] == ["too long"]


def test_report_as_text_and_json(file, processor, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    report = check_file(Check(file=file, max_frames=4, workers=0), processor)
    assert "11/11" in capsys.readouterr().err  # the progress bar
    lines = str(report).splitlines()
    assert lines[0] == file
    assert lines[1] == "  11 records, 4 usable: 7 video, 1 image, 1 text only"
    assert lines[2] == "  6 records with 7 tagged nouns, 6 masks in 5 annotated frames"
    assert lines[3] == "  1 tagged noun without any mask pixel, whose attention is not trained"
    assert lines[4].startswith("  tokens per sample: ")
    assert lines[5] == "  9 problems: 4 in annotation, 2 in video, 2 in conversations, 1 in record"
    assert len(lines) == 6 + 9
    assert lines[9].startswith("    record 7 (masks), annotation[0]['3']: mask size 64 x 64 does not fit")
    data = json.loads(json.dumps(report.as_dict()))
    assert data["counts"]["usable"] == 4 and data["problems_by_kind"]["annotation"] == 4
    assert data["problems"][3]["key"] == "annotation[0]['3']"


def test_report_without_problems(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([entry("b", "What?")]))
    report = check_file(Check(file=str(tmp_path / "a.json"), workers=0), progress=False)
    assert str(report).endswith("  no problems")
    assert report.problems == [] and report.counts["usable"] == 1


def test_unreadable_file(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl"):
        check_file(Check(file=str(tmp_path / "nowhere.jsonl")))


def test_only_the_part_of_the_records_that_is_used_is_checked(file, processor):
    """Without tags, annotations that do not match and masks that do not decode are no problem."""
    report = check_file(Check(file=file, max_frames=4, workers=0, use_tags=False), processor, progress=False)
    assert [problem.record for problem in report.problems] == [4, 5, 8, 9, 10]
    assert (report.counts["tags"], report.counts["masks"], report.counts["usable"]) == (0, 0, 6)


def test_later_turns_are_not_checked(tmp_path, processor):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    bad = [{"from": "human", "value": "And <|im_end|>?"}, {"from": "gpt", "value": "This."}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns + bad}]))
    options = {"file": str(tmp_path / "a.json"), "workers": 0}
    assert len(check_file(Check(**options), processor, progress=False).problems) == 1
    assert check_file(Check(**options, turns=1), processor, progress=False).problems == []


def test_system_prompt_counts(tmp_path, processor):
    (tmp_path / "a.json").write_text(json.dumps([entry("x", "What?")]))
    options = {"file": str(tmp_path / "a.json"), "workers": 0}
    plain, none = (
        check_file(Check(**options, **more), processor, progress=False).tokens["most"]
        for more in ({}, {"system_prompt": ""})
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert plain - none == len(processor.tokenizer(system)["input_ids"])


def test_a_noun_before_the_video_is_a_problem_unless_the_softmax_runs_over_all(tmp_path, clip, processor):
    mask = rle(box(H, W, 0, 20, 0, 30))
    entries = [entry("a", "A <ins>dog</ins>? <video>", video=str(clip(12)), annotation=[{"3": mask}])]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    options = {"file": str(tmp_path / "a.json"), "max_frames": 4, "workers": 0}
    (problem,) = check_file(Check(**options), processor, progress=False).problems
    assert "the noun comes before the video" in problem.reason
    assert check_file(Check(**options, softmax="full"), processor, progress=False).problems == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_whose_index_lies_is_a_problem_of_each_of_its_records(tmp_path, clip, workers):
    uncoded(tmp_path / "a.mp4")
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (W, H)).save(tmp_path / "frames" / "0.png")
    videos = ["a.mp4", "a.mp4", str(clip(12)), "frames"]
    (tmp_path / "a.json").write_text(json.dumps([entry(str(i), "What?", video=v) for i, v in enumerate(videos)]))
    report = check_file(Check(file=str(tmp_path / "a.json"), workers=workers), progress=False)
    assert [(problem.record, problem.kind) for problem in report.problems] == [(0, "video"), (1, "video")]
    for problem in report.problems:
        assert "a.mp4: the file claims 50 frames, but decoding it in a row gives 49" in problem.reason
    assert (report.counts["usable"], report.warnings, report.clips_in_part) == (2, [], 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_that_decord_itself_numbers_otherwise_are_warned_of_once(tmp_path, clip, workers):
    edited(tmp_path / "hidden.mp4", 5)
    mask = rle(box(48, 64, 0, 20, 0, 30))
    tagged = [entry(str(i), "A <ins>dog</ins>?", video="hidden.mp4", annotation=[{"20": mask}]) for i in range(4)]
    sound = entry("4", "A <ins>dog</ins>?", video=str(clip(12)), annotation=[{"3": rle(box(H, W, 0, 20, 0, 30))}])
    untagged = [entry("5", "A dog?", video="hidden.mp4")]
    file = tmp_path / "a.json"
    for entries, warned in (([*tagged, sound], 1), ([sound, *untagged], 0)):
        file.write_text(json.dumps(entries))
        report = check_file(Check(file=str(file), workers=workers), progress=False)
        assert report.problems == [] and len(report.warnings) == warned and str(report).endswith("  no problems")
        assert ("hidden.mp4 than those displayed, as at 11, 16, 20, 22, 27 …: masks" in str(report)) == bool(warned)


def test_clips_too_long_to_be_compared_are_counted(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(MediaReader, "compare", lambda self, record: False)
    (tmp_path / "a.json").write_text(json.dumps([entry(str(i), "What?", video=str(clip(12))) for i in range(3)]))
    report = check_file(Check(file=str(tmp_path / "a.json"), workers=0), progress=False)
    assert report.clips_in_part == 1 and "to the end: 1 clip;" in str(report)
