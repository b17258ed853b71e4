"""The command line: exit codes and messages; what the jobs do is tested beside their code."""

import json

import pytest

from swim_fast.cli import main
from swim_fast.demo.tiny_model import build_checkpoint
from tests.training.conftest import TEXTS, record, square_clip, write_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    records = [record("clip.mp4", square_clip(folder / "clip.mp4", 0))]
    write_records(folder / "good.jsonl", records)
    write_records(folder / "bad.jsonl", [*records, record("absent.mp4", []), json.loads(json.dumps(records[0]))])
    build_checkpoint(folder / "model", TEXTS * 3, seed=0, vocab_size=300)
    return folder


def test_check_exits_with_0_or_1(folder, capsys):
    assert main(["data", "check", str(folder / "good.jsonl"), "--model", str(folder / "model"), "--workers", "1"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert main(["data", "check", str(folder / "bad.jsonl"), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "record 1" in out and "absent.mp4" in out


def test_show_writes_a_picture(folder, tmp_path, capsys):
    out = tmp_path / "record.png"
    command = ["data", "show", str(folder / "good.jsonl"), "0", "--model", str(folder / "model"), "--out", str(out)]
    assert main(command) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().out


def test_what_a_user_can_mend_is_one_line(folder, capsys):
    assert main(["data", "show", str(folder / "good.jsonl"), "7", "--model", str(folder / "model")]) == 2
    assert "there is no record 7" in capsys.readouterr().err
    assert main(["train", "absent.yaml"]) == 2
    assert "cannot read absent.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["train", "run.yaml", "--resumed"], ["data", "check", "a.jsonl", "b=c"], ["data"], []]
)
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "swim-fast" in capsys.readouterr().err
