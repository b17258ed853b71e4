"""DAVIS, YouTube-VOS, and a PNG per object and frame."""

import json

import numpy as np
import pytest
from PIL import Image

from swim_fast.data.source.errors import DataError
from swim_fast.data.video.reader import FrameReader
from tests.helpers.clips import read_number
from tests.importing.conftest import H, W, assert_masks, box, write_frames, write_json, write_palette

DOG, CAT = box(0, 10, 0, 20), box(20, 40, 30, 60)


@pytest.fixture
def davis(tmp_path):
    """One clip of three frames with two objects; the third frame shows the first object alone, and void pixels."""
    root = tmp_path / "DAVIS"
    write_frames(root / "JPEGImages/480p/pets", ["00000.jpg", "00001.jpg", "00002.jpg"])
    for name in ("00000", "00001"):
        write_palette(root / f"Annotations/480p/pets/{name}.png", DOG + 2 * CAT)
    write_palette(root / "Annotations/480p/pets/00002.png", DOG + 255 * CAT)
    return root


def texts(record):
    return [turn.text for turn in record.turns]


def test_davis(davis, run, tmp_path):
    names = write_json(tmp_path / "names.json", {"pets": {"1": "dog", "002": "tabby cat"}})
    report, records = run("davis", davis, names=names)
    assert report.counts == {"units": 1, "records": 2, "tags": 2, "masks": 5}
    assert_masks(records[0], {0: DOG, 1: DOG, 2: DOG})
    assert_masks(records[1], {0: CAT, 1: CAT})
    assert [record.name for record in records] == ["pets_dog", "pets_tabby_cat"]
    assert "the <ins>dog</ins>" in texts(records[0])[0] and "the tabby <ins>cat</ins>" in texts(records[1])[0]
    assert "the tabby cat" in texts(records[1])[1]
    assert not (tmp_path / "out/records.jsonl.problems.jsonl").exists()


def test_several_names_in_one_record(davis, run, tmp_path):
    names = write_json(tmp_path / "names.json", {"1": "dog", "2": "cat"})
    _, (record,) = run("davis", davis, names=names, turns=2)
    assert len(record.turns) == 4 and sum("<video>" in text for text in texts(record)) == 1
    assert_masks(record, {0: DOG, 1: DOG, 2: DOG}, tag=0)
    assert_masks(record, {0: CAT, 1: CAT}, tag=1)


def test_objects_of_one_name_become_one_noun(davis, run, tmp_path):
    names = write_json(tmp_path / "names.json", {"1": "dog", "2": "dog"})
    _, (record,) = run("davis", davis, names=names)
    assert "the <ins>dogs</ins>" in texts(record)[0]
    assert_masks(record, {0: DOG | CAT, 1: DOG | CAT, 2: DOG})


def test_own_questions_and_answers(davis, run, tmp_path):
    names = write_json(tmp_path / "names.json", {"1": "dog", "2": "a <ins>cat</ins> on the right"})
    _, records = run("davis", davis, names=names, question=["Where is {name}?"], answer=["Look: {name}."])
    assert texts(records[1]) == [
        "<video>\nWhere is a <ins>cat</ins> on the right?",
        "Look: a cat on the right.",
    ]


def test_youtube_vos_names_its_objects_and_skips_frames(tmp_path, run):
    """Every fifth frame is there; an annotation belongs to the frame of the same name, whatever its index."""
    root = tmp_path / "train"
    write_frames(root / "JPEGImages/0a1", ["00000.jpg", "00005.jpg", "00010.jpg", "00015.jpg"])
    write_palette(root / "Annotations/0a1/00005.png", 3 * DOG)
    write_palette(root / "Annotations/0a1/00015.png", 3 * CAT)
    write_json(root / "meta.json", {"videos": {"0a1": {"objects": {"3": {"category": "giant_panda", "frames": []}}}}})
    _, (record,) = run("youtube-vos", root)
    assert_masks(record, {1: DOG, 3: CAT})
    assert "the giant <ins>panda</ins>" in texts(record)[0]
    with FrameReader() as reader:
        assert read_number(reader.frames(record.media, [3])[0]) == 3  # 00015.jpg


def test_what_is_left_out_is_listed(davis, run, tmp_path):
    write_palette(davis / "Annotations/480p/pets/00007.png", DOG)
    write_palette(davis / "Annotations/480p/pets/00001.png", box(0, 9, 0, 9, H, W // 2))
    (davis / "Annotations/480p/lost").mkdir()
    names = write_json(tmp_path / "names.json", {"1": "dog"})
    report, (record,) = run("davis", davis, names=names)
    assert_masks(record, {0: DOG, 2: DOG})
    found = [str(problem) for problem in report.problems]
    assert len(found) == report.counts["problems"] == 4
    assert "lost" in found[0] and "does not exist; name the folder that it is in with --media" in found[0]
    assert "00001.png: mask size 48 x 32 does not fit" in found[1]
    assert "00007.png:" in found[2] and "has no frame '00007'" in found[2]
    assert "pets, object 2: has no name; give it one in a JSON file with --names" in found[3]
    listed = [json.loads(line) for line in report.listed.read_text().splitlines()]
    assert [problem["name"] for problem in listed] == ["lost", "pets", "pets", "pets"]
    assert "4 left out" in str(report)


def test_colours_are_no_object_numbers(davis, run, tmp_path):
    colours = np.zeros((H, W, 3), np.uint8)
    colours[:10, :20] = 128, 0, 0
    Image.fromarray(colours).save(davis / "Annotations/480p/pets/00001.png")
    names = write_json(tmp_path / "names.json", {"1": "dog", "2": "cat"})
    report, _ = run("davis", davis, names=names)
    assert [problem.reason.partition(" is ")[2][:12] for problem in report.problems] == ["a RGB image,"]


def test_nothing_usable_writes_nothing(davis, run, tmp_path):
    with pytest.raises(DataError, match="nothing in it can be used; first: pets, object 1: has no name"):
        run("davis", davis)
    assert not (tmp_path / "out/records.jsonl").exists()
    assert len((tmp_path / "out/records.jsonl.problems.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("as_file", [True, False])
def test_masks_of_objects_in_a_video_file_or_folder(tmp_path, run, write_video, as_file):
    """SAM 2's output and SA-V's test sets: CLIP/OBJECT/FRAME.png; objects may overlap."""
    root = tmp_path / "sav_test"
    if as_file:
        media = {"media": write_video(root / "mp4/clip.mp4", 9).parent}
    else:
        write_frames(root / "JPEGImages_24fps/clip", [f"{i:05d}.jpg" for i in range(9)])
        media = {}
    both = DOG | box(0, 30, 0, 30)
    for number, mask in (("000", DOG), ("001", both)):
        folder = root / f"Annotations_6fps/clip/{number}"
        folder.mkdir(parents=True)
        for frame in (0, 4, 8):
            Image.fromarray(mask * 255).save(folder / f"{frame:05d}.png")
        Image.fromarray(mask * 0).save(folder / "00003.png")  # hidden
    names = write_json(tmp_path / "names.json", {"clip": {"0": "hand", "1": "person"}})
    _, records = run("masks", root, names=names, **media)
    assert_masks(records[0], {0: DOG, 4: DOG, 8: DOG})
    assert_masks(records[1], {0: both, 4: both, 8: both})
    assert records[0].media.name == ("clip.mp4" if as_file else "clip")


def test_masks_of_one_clip_named_by_their_folders(tmp_path, run, write_video):
    """Frames counted from 1 by ffmpeg, every second one: mask 3 belongs to frame 4."""
    clip = write_video(tmp_path / "clip.mp4", 8)
    for number in (1, 3):
        write_palette(tmp_path / f"masks/red_ball/frame_{number:04d}.png", DOG)
    _, (record,) = run("masks", tmp_path / "masks", media=clip, first=1, every=2)
    assert_masks(record, {0: DOG, 4: DOG})
    assert "the red <ins>ball</ins>" in texts(record)[0]
    report, (record,) = run("masks", tmp_path / "masks", media=clip, first=2, every=2)
    assert "frame 'frame_0001' is before the first, 2; see --first" in str(report.problems[0])
    report, (record,) = run("masks", tmp_path / "masks", media=clip, every=3)
    assert "frame 9 is not in the clip" in str(report.problems[0])


def test_chosen_clips(davis, run, tmp_path):
    write_frames(davis / "JPEGImages/480p/more", ["00000.jpg"])
    write_palette(davis / "Annotations/480p/more/00000.png", DOG)
    names = write_json(tmp_path / "names.json", {"1": "dog", "2": "cat"})
    chosen = tmp_path / "train.txt"
    chosen.write_text("more\n")
    _, (record,) = run("davis", davis, names=names, clips=chosen)
    assert record.name == "more_dog"
    chosen.write_text("more\nless\n")
    with pytest.raises(DataError, match="has no 'less'; correct the list"):
        run("davis", davis, names=names, clips=chosen)


def test_paths_start_from_the_folder_of_the_records(davis, run, tmp_path):
    names = write_json(tmp_path / "names.json", {"1": "dog", "2": "cat"})
    run("davis", davis, names=names)
    written = json.loads((tmp_path / "out/records.jsonl").read_text().splitlines()[0])
    assert written["video"] == str(davis / "JPEGImages/480p/pets")  # elsewhere
    from swim_fast.importing.run import import_data
    from swim_fast.jobs import Import

    out = davis / "records.json"
    import_data(Import(format="davis", source=str(davis), out=str(out), names=str(names), progress=False))
    assert json.loads(out.read_text())[0]["video"] == "JPEGImages/480p/pets"


def test_masks_among_the_frames_are_refused(davis, run, tmp_path):
    write_palette(davis / "JPEGImages/480p/pets/00001.png", DOG)
    names = write_json(tmp_path / "names.json", {"1": "dog"})
    with pytest.raises(DataError, match="has two images of one name; are masks among the frames"):
        run("davis", davis, names=names)


def test_names_that_differ_in_case_are_one(davis, run, tmp_path):
    names = write_json(tmp_path / "names.json", {"1": "Tabby cat", "2": "tabby_cat"})
    _, (record,) = run("davis", davis, names=names)
    assert "the tabby <ins>cats</ins>" in texts(record)[0]


@pytest.mark.parametrize("as_file", [True, False])
def test_object_numbers_elsewhere_than_the_clips(davis, run, write_video, tmp_path, as_file):
    """SAM 2's vos_inference.py writes CLIP/FRAME.png into a folder of its own."""
    media = write_video(tmp_path / "videos/pets.mp4", 3).parent if as_file else davis / "JPEGImages/480p"
    names = write_json(tmp_path / "names.json", {"pets": {"1": "dog", "2": "cat"}})
    _, (dog, cat) = run("davis", davis / "Annotations/480p", names=names, media=media)
    assert_masks(dog, {0: DOG, 1: DOG, 2: DOG})
    assert_masks(cat, {0: CAT, 1: CAT})
    assert dog.media == media / ("pets.mp4" if as_file else "pets")
