"""Small data sets of other formats, made as their documentation describes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swim_fast.data.check import check_file
from swim_fast.data.source.masks import decode_segmentation
from swim_fast.data.source.records import RecordFile
from swim_fast.importing.run import import_data
from swim_fast.jobs import Check, Import
from tests.helpers.clips import numbered_frames, write_clip

H, W = 48, 64


def box(top: int, bottom: int, left: int, right: int, height: int = H, width: int = W) -> np.ndarray:
    """A mask, uint8 [height, width], of one rectangle."""
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def rle(mask: np.ndarray) -> dict:
    """COCO's compressed run-length code of a mask."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask))
    return {"size": list(map(int, code["size"])), "counts": code["counts"].decode()}


def write_frames(folder: Path, names: list[str]) -> None:
    """Write frames that show their own index, as JPEG files of these names."""
    folder.mkdir(parents=True)
    for name, frame in zip(names, numbered_frames(len(names), H, W), strict=True):
        Image.fromarray(frame).save(folder / name, quality=95)


def write_palette(path: Path, labels: np.ndarray) -> None:
    """Write a PNG with a palette, as DAVIS has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [0] * 756)
    image.save(path)


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def write_video():
    """write_video(path, count): an mp4 whose frames show their own index."""

    def write(path: Path, count: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_clip(path, numbered_frames(count, H, W), 10)

    return write


@pytest.fixture
def run(tmp_path):
    """run(format, source, **options): the report and the records, after `data check` found nothing wrong with them."""

    def run(format: str, source: Path, **options):
        out = tmp_path / "out" / "records.jsonl"
        options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        report = import_data(Import(format=format, source=str(source), out=str(out), progress=False, **options))
        checked = check_file(Check(file=str(out), workers=0), progress=False)
        assert checked.problems == []
        return report, list(RecordFile(out))

    return run


def decoded(record, tag: int = 0) -> dict[int, np.ndarray]:
    """The masks of one tag of a record by frame index, uint8 [H, W]."""
    return {frame: decode_segmentation(code, H, W) for frame, code in record.objects[tag].items()}


def assert_masks(record, expected: dict[int, np.ndarray], tag: int = 0) -> None:
    """Compare the masks of one tag pixel by pixel."""
    found = decoded(record, tag)
    assert found.keys() == expected.keys()
    for frame, mask in expected.items():
        np.testing.assert_array_equal(found[frame], mask)
