"""Atomic writes and append-only logs: what a reader sees at any time, and after a crash."""

import json
import os
import subprocess
import sys

import pytest

from swim_fast.errors import UserError
from swim_fast.files import AppendLog, FileError, FileInUseError, atomic_write, read_log


@pytest.mark.parametrize("mode, content", [("w", "ä\n"), ("wb", b"\x00\xff")])
def test_a_file_is_replaced_as_a_whole(tmp_path, mode, content):
    path = tmp_path / "deep" / "er" / "file"
    path.parent.mkdir(parents=True)
    path.write_text("old")
    with atomic_write(path, mode) as file:
        file.write(content)
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == (content if mode == "wb" else content.encode())
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, sys\nfrom swim_fast.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n    file.write('new')\n    file.flush()\n    os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == 9
    assert path.read_text() == "old"


def test_two_writers_of_one_path_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write("1" * 10)
        second.write("2" * 20)
    assert path.read_text() == "1" * 10
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="below cannot be written"), atomic_write(tmp_path / "file" / "below"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder cannot be written: Is a directory"), atomic_write(tmp_path / "folder"):
        pass
    with pytest.raises(FileError, match="folder cannot be written: Is a directory"):
        AppendLog(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert issubclass(FileError, UserError) and issubclass(FileError, OSError)


def test_entries_come_back_by_offset(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with AppendLog(path) as log:
        offsets = [log.append({"n": n, "text": "ä\n\ud800"}) for n in range(3)]
        # In the file at once: a process that is killed closes nothing.
        assert len(path.read_text().splitlines()) == 3
        assert log.read(offsets[1])["n"] == 1
        log.append({"n": 3})
        assert [offset for offset, _ in log.entries()][:3] == offsets
    assert [entry["n"] for _, entry in read_log(path)] == [0, 1, 2, 3]


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log, pytest.raises(FileInUseError, match="in use by another run; choose another --log"):
        log.append({"n": 0})
        AppendLog(path, remedy="choose another --log")
    with AppendLog(path) as log:
        assert [entry for _, entry in log.entries()] == [{"n": 0}]


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_a_torn_last_line_is_cut_off_and_said(tmp_path, caplog, cut):
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        log.append({"n": 0})
        log.append({"n": 1})
    path.write_bytes(path.read_bytes()[:-cut])
    whole = [0, 1] if cut == 1 else [0]  # a line that lacks nothing but its end is whole
    assert [entry["n"] for _, entry in read_log(path)] == whole
    with AppendLog(path, lost="n is counted again") as log:
        assert ("the last line was torn off; n is counted again" in caplog.text) == (cut > 1)
        log.append({"n": 2})
        assert [entry["n"] for _, entry in log.entries()] == [*whole, 2]
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [*whole, 2]


def test_damaged_lines_are_passed_over_and_counted(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 0}\n\nnot JSON\n[1]\n{"m": 1}\n{"n": 2}\n')
    assert [entry for _, entry in read_log(path, lambda entry: entry["n"])] == [0, 2]
    assert f"{path}: 3 damaged lines are passed over" in caplog.text
