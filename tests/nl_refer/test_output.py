"""Files of records are written whole or not at all."""

import json

import pytest

from swim_fast.data.source.records import RecordFile
from swim_fast.nl_refer.output import check_distinct, media_note, record_writer

RECORDS = [{"conversations": [{"from": "human", "value": text}]} for text in ("ä", "b\n", "c")]


@pytest.mark.parametrize("name", ["set.json", "set.jsonl", "deep/er/set.jsonl"])
def test_what_is_written_can_be_read(tmp_path, name):
    path = tmp_path / name
    with record_writer(path) as write:
        for record in RECORDS:
            write(record)
        assert not path.exists()
    file = RecordFile(path)
    assert [file.raw(i) for i in range(len(file))] == RECORDS and "ä" in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").startswith("[") == name.endswith(".json")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "set.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), record_writer(path) as write:
        write(RECORDS[0])
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_no_records(tmp_path):
    with record_writer(tmp_path / "set.json"):
        pass
    assert json.loads((tmp_path / "set.json").read_text()) == []


def test_half_a_surrogate_pair(tmp_path):
    with record_writer(tmp_path / "set.jsonl") as write:
        write({"name": "\ud800", "other": "ä"})
    assert json.loads((tmp_path / "set.jsonl").read_text()) == {"name": "\ud800", "other": "ä"}


def test_files_that_are_the_same(tmp_path):
    check_distinct(tmp_path / "a", out=tmp_path / "b", table=None)
    with pytest.raises(ValueError, match="--out .* is the input as well"):
        check_distinct(tmp_path / "a", out=tmp_path / "x" / ".." / "a")
    with pytest.raises(ValueError, match="--review .* is --out as well"):
        check_distinct(tmp_path / "a", out=tmp_path / "b", review=tmp_path / "b")


def test_a_file_in_another_folder_is_told_where_its_media_are(tmp_path):
    assert media_note(tmp_path / "a", tmp_path / "b") == []
    assert str(tmp_path) in media_note(tmp_path / "a", tmp_path / "deeper" / "b")[0]
