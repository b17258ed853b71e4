"""Benchmark files in the published formats, over real clips and a folder of frames."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swim_fast.evaluation.published import QUESTION_TYPES
from tests.data.conftest import rle
from tests.training.conftest import checkpoint, record, square_clip, text_record, write_records  # noqa: F401

CLIPS = 4
OPTIONS = ("It moves to the right", "It is four", "two and two", "The square")


def question(number: int, video: str, **changes) -> dict:
    """A record as VideoRefer-Bench-Q has them, the object named in words."""
    return {
        "id": number,
        "video": video,
        # of another length in each record, so that batches are padded
        "Question": f"What does the {'big ' * number}<ins>square</ins> do in clip {number}?",
        "type": QUESTION_TYPES[number % 2],
        "options": [f"({letter}) {text}" for letter, text in zip("ABCD", OPTIONS, strict=True)],
        "Answer": f"({'ABCD'[number % 4]}) {OPTIONS[number % 4]}",
        "frame_idx": "2",
        "annotation": [{"2": {"segmentation": rle(np.ones((64, 96), np.uint8))}}],
        **changes,
    }


def description(number: int, video: str, **changes) -> dict:
    """A record as VideoRefer-Bench-D has them, with a question in words."""
    return {
        "id": number,
        "video": video,
        "Question": "What does the square do?",
        "caption": f"The square of clip {number} moves to the right.",
        "frame_idx": "2",
        "annotation": [{"2": {"segmentation": None}}],
        **changes,
    }


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """0.mp4 … 3.mp4, `frames`, a folder of frames, and broken.mp4."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(CLIPS):
        square_clip(folder / f"{number}.mp4", number)
    (folder / "frames").mkdir()
    for t in range(5):
        frame = np.full((64, 96, 3), 40 * t, np.uint8)
        Image.fromarray(frame).save(folder / "frames" / f"{t:05d}.jpg")
    (folder / "broken.mp4").write_bytes(b"no clip at all" * 50)
    return folder


@pytest.fixture(scope="session")
def videos() -> list[str]:
    return [*(f"{number}.mp4" for number in range(CLIPS)), "frames"]


@pytest.fixture(scope="session")
def questions(clips, videos) -> Path:
    """Five good records, one whose clip is broken (5), one with a placeholder (6)."""
    records = [question(number, video) for number, video in enumerate([*videos, "broken.mp4"])]
    records.append(question(6, "0.mp4", Question="What is <object3><region> not wearing?"))
    path = clips / "VideoRefer-Bench-Q.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def descriptions(clips, videos) -> Path:
    """Five good records and one whose clip is broken (5)."""
    path = clips / "VideoRefer-Bench-D.json"
    path.write_text(json.dumps([description(n, video) for n, video in enumerate([*videos, "broken.mp4"])]))
    return path


@pytest.fixture(scope="session")
def annotated(clips) -> Path:
    """NL-Refer records: four with masks, one of text alone (4), one whose clip is broken (5)."""
    lines = [record(f"{n}.mp4", square_clip(clips / f"{n}.mp4", n)[: 3 + n % 3]) for n in range(CLIPS)]
    for number in (0, 2):  # a noun of several tokens, that is, rows
        lines[number]["conversations"][0]["value"] = "<video>\nWhat does the <ins>polyhedron</ins> do, if anything?"
    lines += [text_record(0), {**lines[0], "video": "broken.mp4"}]
    return write_records(clips / "nl_refer.jsonl", lines)


def arguments(job: str, model, file, out, *more) -> list[str]:
    """Of the command line, at a size for tests."""
    small = ["--max-frames", "4", "--batch-size", "2", "--workers", "0", "--dtype", "float32"]
    return ["evaluate", job, str(model), str(file), "--out", str(out), *small, *map(str, more)]


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def stable(out: Path) -> dict:
    """The results without the texts of problems: decoders put times and addresses into theirs."""
    found = results(out)
    return {**found, "problems": sorted(found["problems"])}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
