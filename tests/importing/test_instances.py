"""COCO, YouTube-VIS, LabelMe and CVAT."""

import base64
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from swim_fast.data.source.errors import DataError
from tests.importing.conftest import H, W, assert_masks, box, rle, write_frames, write_json

DOG, CAT = box(0, 10, 0, 20), box(20, 40, 30, 60)
DOG_POLYGON = [0, 0, 20, 0, 20, 10, 0, 10]


def uncompressed(mask):
    flat = mask.T.flatten()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": [H, W], "counts": [0, *runs] if flat[0] else runs}


@pytest.fixture
def coco(tmp_path):
    """annotations/instances_train2017.json beside train2017/, as COCO is unpacked."""
    write_frames(tmp_path / "train2017", ["000000000009.jpg", "000000000025.jpg"])
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": H, "width": W} for i in (9, 25)]
    categories = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"}]
    annotations = [
        {
            "id": 1,
            "image_id": 9,
            "category_id": 18,
            "segmentation": [DOG_POLYGON],
            "iscrowd": 0,
            "bbox": [0, 0, 20, 10],
        },
        {"id": 2, "image_id": 9, "category_id": 1, "segmentation": uncompressed(CAT), "iscrowd": 1},
        {"id": 3, "image_id": 25, "category_id": 18, "segmentation": [DOG_POLYGON], "iscrowd": 0},
        {"id": 4, "image_id": 25, "category_id": 18, "segmentation": rle(CAT), "iscrowd": 0},
    ]

    def write(**changes):
        value = {"info": {}, "images": images, "annotations": annotations, "categories": categories} | changes
        return write_json(tmp_path / "annotations/instances_train2017.json", value)

    write.annotations = annotations
    return write


def test_coco(coco, run):
    report, (dog, people, dogs) = run("coco", coco())
    assert dog.kind == "image" and dog.media.name == "000000000009.jpg"
    assert "the <ins>dog</ins> in this image" in dog.turns[0].text or "the <ins>dog</ins>" in dog.turns[0].text
    assert "the <ins>people</ins>" in people.turns[0].text  # a crowd
    assert "the <ins>dogs</ins>" in dogs.turns[0].text  # two of them
    assert_masks(dog, {0: DOG})
    assert_masks(people, {0: CAT})
    assert_masks(dogs, {0: DOG | CAT})
    assert report.counts["problems"] == 0


def test_coco_mistakes_are_named(coco, run):
    wrong = [
        {"id": 5, "image_id": 9, "category_id": 99, "segmentation": [DOG_POLYGON]},
        {"id": 6, "image_id": 9, "category_id": 1, "bbox": [0, 0, 9, 9]},
        {"id": 7, "image_id": 9, "category_id": 1, "segmentation": [[0, 0, 900, 0, 0, 900]]},
    ]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": H, "width": W} for i in (9, 25, 30)]
    wrong.append({"id": 8, "image_id": 30, "category_id": 1, "segmentation": [DOG_POLYGON]})
    report, records = run("coco", coco(annotations=[*coco.annotations, *wrong], images=images))
    assert len(records) == 3
    problems = [str(problem) for problem in report.problems]
    assert "annotation 5: category_id 99 is not among the categories" in problems[0]
    assert "annotation 6: has no segmentation with a pixel in it; a bbox alone is no mask" in problems[1]
    assert "annotation 7: polygon 0 leaves the frame" in problems[2]
    assert "000000000030.jpg does not exist; name the folder that it is in with --media" in problems[3]


def test_coco_of_another_size_is_refused(coco, run):
    images = [{"id": 9, "file_name": "000000000009.jpg", "height": H, "width": H}]
    polygon = [{"id": 1, "image_id": 9, "category_id": 18, "segmentation": [DOG_POLYGON]}]
    with pytest.raises(DataError, match="mask size 48 x 48 does not fit the video's 48 x 64"):
        run("coco", coco(annotations=polygon, images=images))


def test_coco_without_its_keys(tmp_path, run):
    with pytest.raises(DataError, match=r"a.json, categories: is missing, expected a list; it has images"):
        run("coco", write_json(tmp_path / "a.json", {"images": []}))


def test_youtube_vis(tmp_path, run):
    names = ["00000.jpg", "00005.jpg", "00010.jpg"]
    write_frames(tmp_path / "train/JPEGImages/0043f083b5", names)
    video = {"id": 1, "width": W, "height": H, "length": 3, "file_names": [f"0043f083b5/{name}" for name in names]}
    codes = {1: [uncompressed(DOG), None, uncompressed(DOG)], 2: [None, uncompressed(CAT), None]}
    annotations = [
        {"id": i, "video_id": 1, "category_id": i, "segmentations": code, "areas": [], "bboxes": [], "iscrowd": 0}
        for i, code in codes.items()
    ]
    annotations.append({"id": 3, "video_id": 1, "category_id": 2, "segmentations": [None]})
    categories = [{"id": 1, "name": "giant_panda"}, {"id": 2, "name": "flying_disc"}]
    value = {"videos": [video], "annotations": annotations, "categories": categories}
    report, (panda, disc) = run("youtube-vis", write_json(tmp_path / "train.json", value))
    assert "the giant <ins>panda</ins>" in panda.turns[0].text
    assert_masks(panda, {0: DOG, 2: DOG})
    assert_masks(disc, {1: CAT})
    assert [str(p) for p in report.problems] == [
        "0043f083b5, annotation 3: has 1 segmentations for the 3 frames of the video"
    ]


def labelme(image, *shapes, **changes):
    shapes = [{"label": label, "points": points, "shape_type": "polygon"} | more for label, points, more in shapes]
    value = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": None}
    return value | {"imageHeight": H, "imageWidth": W} | changes


def base64_png(mask):
    file = io.BytesIO()
    Image.fromarray(mask.astype(bool)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


SQUARE = [[0, 0], [20, 0], [20, 10], [0, 10]]


@pytest.fixture
def labelled(tmp_path):
    write_frames(tmp_path / "imgs", ["1.jpg", "2.jpg"])
    part = {"shape_type": "mask", "mask": base64_png(CAT[20:40, 30:60]), "group_id": 4}
    value = labelme(
        "..\\imgs\\1.jpg",
        ("dog-1", SQUARE, {}),
        ("cat", [[30, 20], [59, 39]], part),
        ("cat", SQUARE, {"group_id": 4}),
        ("bird", [[0, 0], [9, 9]], {"shape_type": "rectangle"}),
    )
    write_json(tmp_path / "labels/1.json", value)
    return tmp_path


def test_labelme(labelled, run):
    report, (dog, cat) = run("labelme", labelled / "labels")
    assert dog.kind == "image" and "the <ins>dog</ins>" in dog.turns[0].text
    assert_masks(dog, {0: DOG})
    assert "the <ins>cat</ins>" in cat.turns[0].text  # two shapes of one group are one cat
    assert_masks(cat, {0: DOG | CAT})
    assert [str(p) for p in report.problems] == [
        "1.json, shapes[3]: is a rectangle, which is no mask; draw polygons, or make masks of it with SAM 2"
    ]


def test_labelme_of_frames(labelled, run):
    """Files beside the frames of one clip."""
    for i, (label, points) in enumerate([("dog", SQUARE), ("dog", [[30, 20], [60, 20], [60, 40], [30, 40]])]):
        write_json(labelled / f"imgs/{i + 1}.json", labelme(f"{i + 1}.jpg", (label, points, {})))
    write_json(labelled / "imgs/7.json", labelme("7.jpg", ("dog", SQUARE, {})))
    report, (record,) = run("labelme-video", labelled / "imgs")
    assert record.kind == "video" and record.media.name == "imgs"
    assert "the <ins>dog</ins>" in record.turns[0].text  # never two of them in a frame
    assert_masks(record, {0: DOG, 1: CAT})
    assert "7.json" in str(report.problems[0]) and "has no frame '7'" in str(report.problems[0])


def cvat(body, meta=""):
    size = f"<original_size><width>{W}</width><height>{H}</height></original_size>"
    meta = f"<meta><task><id>1</id>{size}</task><source>clip.mp4</source>{meta}</meta>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{meta}{body}</annotations>'


def row_runs(mask):
    """CVAT's runs of a box: along the rows, the first one outside."""
    flat = mask.flatten()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return ", ".join(map(str, [0, *runs] if flat[0] else runs))


POLYGON = 'points="0.00,0.00;20.00,0.00;20.00,10.00;0.00,10.00" occluded="0"'


@pytest.mark.parametrize("media", ["beside", "file", "folder"])
def test_cvat_of_a_video(tmp_path, run, write_video, media):
    ring = CAT.copy()
    ring[25:30, 40:50] = 0
    clip = write_video(tmp_path / ("xml" if media == "beside" else "videos") / "clip.mp4", 6)
    tracks = f"""
      <track id="0" label="dog" source="manual">
        <polygon frame="0" outside="0" keyframe="1" {POLYGON}></polygon>
        <polygon frame="1" outside="0" keyframe="0" {POLYGON}><attribute name="a">b</attribute></polygon>
        <polygon frame="2" outside="1" keyframe="1" {POLYGON}></polygon>
      </track>
      <track id="1" label="Stop sign" source="auto">
        <mask frame="5" outside="0" rle="{row_runs(ring[20:40, 30:60])}" left="30" top="20" width="30" height="20"/>
      </track>
      <track id="2" label="car"><box frame="0" outside="0" xtl="1" ytl="1" xbr="9" ybr="9"/></track>"""
    path = tmp_path / "xml/annotations.xml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(cvat(tracks))
    options = {"beside": {}, "file": {"media": clip}, "folder": {"media": clip.parent}}[media]
    report, (dog, sign) = run("cvat", path, **options)
    assert_masks(dog, {0: DOG, 1: DOG})
    assert "the stop <ins>sign</ins>" in sign.turns[0].text
    assert_masks(sign, {5: ring})
    assert [str(p) for p in report.problems] == [
        "clip, track 2 (car): is a box, which is no mask; draw polygons or masks"
    ]


def test_cvat_export_is_read_from_its_zip(tmp_path, run, write_video):
    write_video(tmp_path / "clip.mp4", 6)
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        body = f'<track id="0" label="dog"><polygon frame="1" outside="0" {POLYGON}/></track>'
        archive.writestr("annotations.xml", cvat(body, "<task><source>clip.mp4</source></task>"))
    _, (dog,) = run("cvat", tmp_path / "task.zip")
    assert_masks(dog, {1: DOG})
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("instances.json", "{}")
    with pytest.raises(DataError, match='has no annotations.xml; export it as "CVAT for video 1.1"'):
        run("cvat", tmp_path / "other.zip")


def test_cvat_of_images(tmp_path, run):
    write_frames(tmp_path / "images", ["a.jpg"])
    image = f'<image id="0" name="a.jpg" width="{W}" height="{H}"><polygon label="dog" {POLYGON}/></image>'
    (tmp_path / "annotations.xml").write_text(cvat(image))
    _, (dog,) = run("cvat", tmp_path / "annotations.xml")
    assert dog.kind == "image"
    assert_masks(dog, {0: DOG})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<tracks/>", "has no track with shapes and no image"),
        ("<track", "cannot be read as XML"),
        (f'<track id="0" label="dog"><polygon frame="0" outside="1" {POLYGON}/></track>', "is outside in every frame"),
        (f'<track id="0" label="dog"><polygon frame="9" outside="0" {POLYGON}/></track>', "frame 9 is not in the clip"),
        (
            '<track id="0" label="dog"><mask frame="0" rle="3, 4" left="0" top="0" width="3" height="3"/></track>',
            "its rle covers 7 pixels, its box of 3 x 3",
        ),
    ],
)
def test_cvat_mistakes_are_named(tmp_path, run, write_video, body, reason):
    write_video(tmp_path / "clip.mp4", 6)
    (tmp_path / "a.xml").write_text(cvat(body))
    with pytest.raises(DataError, match=reason):
        run("cvat", tmp_path / "a.xml")
