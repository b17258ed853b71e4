"""SA-V's train set and SAM 2's codes."""

import json

import pytest

from tests.importing.conftest import H, W, assert_masks, box, rle, write_json

DOG, CAT, EMPTY = box(0, 10, 0, 20), box(20, 40, 30, 60), box(0, 0, 0, 0)


def sav(*frames, **changes):
    """The keys of `sav_000001_manual.json`, for masks [frame][object]."""
    codes = [[rle(mask) for mask in frame] for frame in frames]
    value = {"video_id": "sav_000001", "video_duration": 0.375, "video_frame_count": 9.0, "video_height": float(H)}
    value |= {"video_width": float(W), "video_environment": "Indoor", "video_split": "train", "masklet": codes}
    value |= {"masklet_id": list(range(len(codes[0]))), "masklet_type": ["manual"] * len(codes[0]), "masklet_num": 2}
    return value | changes


@pytest.fixture
def folder(tmp_path, write_video):
    folder = tmp_path / "sav_000"
    write_video(folder / "sav_000001.mp4", 9)
    return folder


def test_sav_is_annotated_every_fourth_frame(folder, run, tmp_path):
    write_json(folder / "sav_000001_manual.json", sav([DOG, CAT], [DOG, EMPTY], [EMPTY, CAT]))
    names = write_json(tmp_path / "names.json", {"sav_000001": {"0": "dog", "1": "cat"}})
    report, records = run("sa-v", tmp_path, names=names)
    assert_masks(records[0], {0: DOG, 4: DOG})
    assert_masks(records[1], {0: CAT, 8: CAT})  # an empty code is no mask
    assert report.counts["problems"] == 0


def test_sav_automatic_objects_have_names_of_their_own(folder, run, tmp_path):
    write_json(folder / "sav_000001_manual.json", sav([DOG], [EMPTY], [EMPTY]))
    write_json(folder / "sav_000001_auto.json", sav([CAT], [EMPTY], [EMPTY], masklet_id=[7]))
    names = write_json(tmp_path / "names.json", {"sav_000001": {"0": "dog"}, "sav_000001_auto": {"7": "cat"}})
    _, records = run("sa-v", folder, names=names)
    found = {record.turns[0].text.partition("<ins>")[2].partition("<")[0]: record for record in records}
    assert_masks(found["dog"], {0: DOG})
    assert_masks(found["cat"], {0: CAT})


def test_sav_mistakes_are_named(folder, run, tmp_path):
    write_json(folder / "sav_000001_manual.json", sav([DOG, CAT], [DOG, CAT], [DOG, CAT]))
    write_json(folder / "sav_000001_auto.json", sav(*[[DOG, CAT]] * 9))  # of a clip at another rate
    write_json(folder / "sav_000002_manual.json", sav([DOG, CAT], [DOG]))
    write_json(folder / "sav_000003_manual.json", {"masklets": []})
    names = write_json(tmp_path / "names.json", {"0": "dog"})
    report, (record,) = run("sa-v", folder, names=names)
    assert_masks(record, {0: DOG, 4: DOG, 8: DOG})
    problems = [str(problem) for problem in report.problems]
    assert "has 9 annotated frames, one of 4, and" in problems[0] and "has 9 frames" in problems[0]
    assert "object 1: has no name" in problems[1] and "sav_000001_manual.json" in problems[1]
    assert "sav_000002" in problems[2] and "masklet[1]: is not a list of 2 codes" in problems[2]
    assert "masklet: is missing, expected a list; it has masklets" in problems[3]


FORMS = {
    "list": [
        {"frame_index": 2, "results": [{"object_id": 1, "mask": rle(DOG)}, {"object_id": 2, "mask": rle(CAT)}]},
        {"frame_index": 5, "results": [{"object_id": 1, "mask": rle(DOG)}, {"object_id": 2, "mask": rle(EMPTY)}]},
    ],
    "segments": {"2": {"1": rle(DOG), "2": rle(CAT)}, "5": {"1": rle(DOG), "2": rle(EMPTY)}},
}


@pytest.mark.parametrize("form", [*FORMS, "lines"])
def test_sam2(folder, run, tmp_path, form):
    if form == "lines":
        path = tmp_path / "masks.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in FORMS["list"]))
    else:
        path = write_json(tmp_path / "masks.json", FORMS[form])
    names = write_json(tmp_path / "names.json", {"sav_000001": {"1": "dog", "2": "cat"}})
    report, records = run("sam2", path, names=names, media=folder / "sav_000001.mp4")
    assert_masks(records[0], {2: DOG, 5: DOG})
    assert_masks(records[1], {2: CAT})
    assert report.counts["problems"] == 0


@pytest.mark.parametrize(("frames", "every", "warns"), [(3, None, True), (3, 3, False), (6, None, False)])
def test_masks_of_fewer_frames_than_the_clip_are_told(folder, run, tmp_path, caplog, frames, every, warns):
    """Nine frames, and masks of the first three: perhaps of every third."""
    path = write_json(tmp_path / "masks.json", {str(frame): {"1": rle(DOG)} for frame in range(frames)})
    names = write_json(tmp_path / "names.json", {"1": "dog"})
    run("sam2", path, names=names, media=folder / "sav_000001.mp4", every=every)
    assert ("made of one frame in 3, they are on the wrong ones: see --every" in caplog.text) == warns


def test_sam2_refuses_what_is_of_another_clip(folder, run, tmp_path):
    small = box(0, 10, 0, 10, H, W // 2)
    codes = {"0": {"1": rle(small), "2": rle(CAT)}, "1": {"2": {"size": [H, W], "counts": "04000"}}}
    names = write_json(tmp_path / "names.json", {"1": "dog", "2": "cat"})
    path = write_json(tmp_path / "masks.json", codes)
    report, (record,) = run("sam2", path, names=names, media=folder / "sav_000001.mp4")
    assert_masks(record, {0: CAT})
    problems = [str(problem) for problem in report.problems]
    assert "mask size 48 x 32 does not fit" in problems[0] and "sav_000001, object 1, frame 0" in problems[0]
    assert "object 1: is in no frame of the clip" in problems[1]
    assert "object 2, frame 1: run-length code does not decode" in problems[2]


def test_one_clip_is_not_taken_for_another(folder, run, tmp_path):
    """Two files of masks, and one clip as `--media`."""
    for name in ("sav_000001", "sav_000002"):
        write_json(tmp_path / f"masks/{name}.json", FORMS["segments"])
    names = write_json(tmp_path / "names.json", {"1": "dog", "2": "cat"})
    report, records = run("sam2", tmp_path / "masks", names=names, media=folder / "sav_000001.mp4")
    assert [record.name for record in records] == ["sav_000001_dog", "sav_000001_cat"]
    assert "sav_000002: --media is the clip" in str(report.problems[0])
