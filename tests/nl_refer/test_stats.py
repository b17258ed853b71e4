"""Counts of a set, checked by hand."""

import json

import numpy as np
import pytest

from swim_fast.cli import main
from swim_fast.jobs import Stats
from swim_fast.nl_refer.stats import collect
from tests.data.conftest import box, rle
from tests.training.conftest import square_clip

HEIGHT, WIDTH = 64, 96


def write(folder):
    square_clip(folder / "a.mp4", 0)
    half, quarter = rle(box(HEIGHT, WIDTH, 0, 64, 0, 48)), rle(box(HEIGHT, WIDTH, 0, 32, 0, 48))
    nothing = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    polygon = [[0, 0, 48, 0, 48, 64, 0, 64]]
    turns = [
        {"from": "human", "value": "The <ins>Dog</ins> and the <ins>big cat</ins>?"},
        {"from": "gpt", "value": "Yes."},
    ]
    one = [{"from": "human", "value": "<video>\nThe <ins>dog</ins>?"}, {"from": "gpt", "value": "Yes."}]
    records = [
        {
            "video": "a.mp4",
            "conversations": turns,
            "annotation": [{"0": {"segmentation": half}, "1": quarter}, {"0": nothing}],
        },
        {"video": "a.mp4", "conversations": one, "annotation": [{"2": polygon, "3": None}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"video": "a.mp4", "conversations": one, "annotation": []},
        {"video": "a.mp4", "conversations": one, "annotation": [{"0": {"size": [HEIGHT, WIDTH], "counts": [3]}}]},
        {"video": "absent.mp4", "conversations": one, "annotation": [{"0": polygon}]},
    ]
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_counts(tmp_path):
    stats = collect(Stats(file=write(tmp_path), reader="pyav"), progress=False)
    assert +stats.counts == {
        "records": 6, "video": 4, "text": 1, "tagged": 4, "tags": 5, "masks": 5, "empty_masks": 2, "problems": 3
    }  # fmt: skip
    assert stats.nouns == {"dog": 4, "big cat": 1} and stats.tags_per_record == {2: 1, 1: 3, 0: 1}
    assert np.allclose(stats.areas, [0.5, 0.25, 0.5], atol=0.02)
    assert list(stats.frames) == [2, 0, 1, 0, 0]
    assert "record 3, annotation" in stats.first_problem
    table = stats.table(top=1)
    assert "5 tagged nouns, 2 of them different" in table and "dog" in table and "big cat" not in table
    assert "3 problems" in table


def test_command(tmp_path, capsys):
    path = write(tmp_path)
    plot = tmp_path / "plots" / "set.png"
    assert main(["nl-refer", "stats", str(path), "--limit", "1", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "1 record: " in out and "records by number of tags: 2: 1" in out
    assert plot.read_bytes()[:4] == b"\x89PNG" and plot.stat().st_size > 10_000
    assert main(["nl-refer", "stats", str(path), "--limit", "0"]) == 2
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "Hi"}]}))
    assert main(["nl-refer", "stats", str(path), "--plot", str(plot)]) == 2
    assert "nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["nowhere.jsonl"])
def test_a_missing_file(broken, capsys):
    assert main(["nl-refer", "stats", broken]) == 2
    assert "cannot be opened" in capsys.readouterr().err
