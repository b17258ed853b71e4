"""Damaged data sets: whatever is wrong in a file, an import ends with records or with one line, never otherwise."""

import copy
import json
import random

import pytest
from PIL import Image

from swim_fast.errors import UserError
from swim_fast.importing.run import import_data
from swim_fast.jobs import Import
from tests.importing.conftest import H, W, box, rle, write_frames

DOG = box(0, 10, 0, 20)
POLYGON = [[0, 0, 20, 0, 20, 10, 0, 10]]
FRAMES = ["00000.jpg", "00001.jpg"]
ASKED = [{"from": "human", "value": "<video>\nWhat is <region>?"}, {"from": "gpt", "value": "A dog."}]
ANSWER = {"role": "assistant", "content": "c"}
SHAPE = {"label": "dog", "points": [[0, 0], [20, 0], [20, 10]], "shape_type": "polygon", "group_id": 1}
SETS = {
    "coco": {
        "images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}],
        "categories": [{"id": 2, "name": "dog"}],
        "annotations": [{"id": 3, "image_id": 1, "category_id": 2, "segmentation": POLYGON, "iscrowd": 0}],
    },
    "youtube-vis": {
        "videos": [{"id": 1, "file_names": [f"clip/{name}" for name in FRAMES], "height": H, "width": W}],
        "categories": [{"id": 2, "name": "dog"}],
        "annotations": [{"id": 3, "video_id": 1, "category_id": 2, "segmentations": [rle(DOG), None]}],
    },
    "labelme": {"shapes": [SHAPE], "imagePath": "a.png", "imageHeight": H, "imageWidth": W},
    "sa-v": {"masklet": [[rle(DOG)]], "masklet_id": [1]},
    "sam2": [{"frame_index": 0, "results": [{"object_id": 1, "mask": rle(DOG)}]}],
    "mevis": {"videos": {"clip": {"frames": ["00000"], "expressions": {"0": {"exp": "a dog", "anno_id": [7]}}}}},
    "pixelrefer": [
        {"id": 1, "video": ["clip"], "masks": [{"0": POLYGON}], "height": H, "width": W, "conversations": ASKED}
    ],
    "ms-swift": [{"system": "a", "query": "b", "response": "c", "history": [["d", "e"]], "videos": ["clip"]}],
    "llama-factory": [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER], "system": "b"}
    ],
}
WRONG = [
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    float("nan"),
    "",
    "x",
    "\ud800",
    "a\0b",
    "x" * 5000,
    "../..",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
]


def mutated(value, rng: random.Random):
    """A copy of JSON in which one node is replaced by something else, or removed."""
    value = copy.deepcopy(value)
    nodes = []

    def walk(node):
        for key in node.keys() if isinstance(node, dict) else range(len(node)):
            nodes.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    node, key = rng.choice(nodes)
    if rng.random() < 0.1:
        del node[key]
    else:
        node[key] = rng.choice(WRONG)
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutations")
    write_frames(folder / "clip", FRAMES)
    Image.new("RGB", (W, H)).save(folder / "a.png")
    (folder / "names.json").write_text('{"1": "dog"}')
    (folder / "mask_dict.json").write_text(json.dumps({"7": [rle(DOG)]}))
    return folder


def imported(folder, format, value):
    """Records written of a set; 0 if it is refused."""
    source, names = folder / "source.json", str(folder / "names.json")
    source.write_text(json.dumps(value))
    media = str(folder / "clip") if format in ("sa-v", "sam2", "mevis") else str(folder)
    options = {"names": names, "media": media, "out": str(folder / "out.jsonl"), "progress": False}
    try:
        return import_data(Import(format=format, source=str(source), **options)).counts["records"]
    except UserError as error:
        assert "\n" not in str(error)
        return 0


@pytest.mark.parametrize("format", SETS)
def test_damage_is_told(folder, format):
    rng = random.Random(0)
    assert imported(folder, format, SETS[format]) == 1
    found = [imported(folder, format, mutated(SETS[format], rng)) for _ in range(60)]
    assert found.count(0) > 5
