"""Several ranks, runs that are killed, and folders that hold another run's predictions."""

import json
import signal
import subprocess
import time

import pytest

from swim_fast.cli import main
from swim_fast.evaluation.predictions import Predictions
from tests.evaluation.conftest import arguments, lines, question, results, stable
from tests.training.conftest import command, environment, run


def test_two_ranks_give_the_table_of_one(checkpoint, questions, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(arguments("questions", checkpoint, questions, one)) == 0
    printed = run(*arguments("questions", checkpoint, questions, two, "--workers", 1), ranks=2)
    assert stable(two) == stable(one)
    tables = [(out / "results.md").read_text().partition("records with no answer")[0] for out in (one, two)]
    assert tables[0] == tables[1] and "| conditions" in tables[0]
    assert printed.count("# VideoRefer-Bench-Q") == 1
    shares = [[e["record"] for e in lines(two / f"predictions-rank{rank}.jsonl")[1:]] for rank in (0, 1)]
    assert shares == [[0, 2, 4], [1, 3, 5]]
    # One rank goes on where two were.
    before = (two / "predictions-rank1.jsonl").read_bytes()
    (two / "predictions-rank1.jsonl").write_bytes(before[: before.rindex(b"\n", 0, -1) - 5])  # record 3 is torn
    assert main(arguments("questions", checkpoint, questions, two)) == 0
    assert stable(two) == stable(one)
    added = [e["record"] for e in lines(two / "predictions-rank0.jsonl")[4:]]
    assert sorted(added) == [3, 5]


def test_a_killed_run_predicts_the_rest(checkpoint, clips, tmp_path):
    source, out = clips / "many.json", tmp_path / "out"
    source.write_text(json.dumps([question(n, f"{n % 4}.mp4") for n in range(60)]))
    words = arguments("questions", checkpoint, source, out, "--batch-size", 1)
    process = subprocess.Popen(command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path, end = out / "predictions-rank0.jsonl", time.monotonic() + 100
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    kept = path.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert 5 <= kept.count(b"\n") < 61, "it was to be killed in the middle"
    with open(path, "ab") as file:
        file.write(b'{"record": 59, "answer": "torn o')
    assert main(words) == 0
    assert path.read_bytes().startswith(kept)
    assert sorted(entry["record"] for entry in lines(path)[1:]) == list(range(60))
    assert results(out)["readings"]["published"]["all"]["answers"] == 60


@pytest.mark.parametrize("left", [b"", b'{"settings": {"evalua', b'{"settings": {}}\n{"record": 0}\nnot JSON\n{"rec'])
def test_what_a_kill_can_leave(tmp_path, left):
    path = tmp_path / "predictions-rank0.jsonl"
    path.write_bytes(left)
    with Predictions(tmp_path, {}) as predictions:
        done = predictions.done
        predictions.open(0)
        with pytest.raises(BlockingIOError, match="in use by another run"):
            Predictions(tmp_path, {}).open(0)
        predictions.add(1, {"answer": "x"})
        predictions.add(2, {"problem": "broken"})
        predictions.add(0, {"problem": "broken for once"})
    assert done == ({0: {"record": 0}} if b"record" in left else {})
    again = Predictions(tmp_path, {})
    assert again.done == {**done, 1: {"record": 1, "answer": "x"}}
    assert again.entries()[2] == {"record": 2, "problem": "broken"}
    with pytest.raises(ValueError, match="seed was None and is 1"):
        Predictions(tmp_path, {"seed": 1})


def test_another_run_is_refused(checkpoint, questions, tmp_path, capsys, monkeypatch):
    assert main(arguments("questions", checkpoint, questions, tmp_path, "--limit", 1)) == 0
    for change, reason in (
        (["--max-frames", 2], "max_frames was 4 and is 2"),
        (["--by", "likelihood"], "by was 'generation' and is 'likelihood'"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
    ):
        assert main(arguments("questions", checkpoint, questions, tmp_path, "--limit", 2, *change)) == 2
        assert reason in capsys.readouterr().err
    assert main(arguments("grounding", checkpoint, questions, tmp_path)) == 2
    assert "evaluation was 'questions' and is 'grounding'" in capsys.readouterr().err
    monkeypatch.setattr("swim_fast.evaluation.run.model_state", lambda path: "trained again")
    assert main(arguments("questions", checkpoint, questions, tmp_path, "--limit", 1)) == 2
    assert "weights was" in capsys.readouterr().err
    monkeypatch.undo()
    # A larger limit and another batch size are the same run.
    assert main(arguments("questions", checkpoint, questions, tmp_path, "--limit", 2, "--batch-size", 1)) == 0
    assert [entry["record"] for entry in lines(tmp_path / "predictions-rank0.jsonl")[1:]] == [0, 1]


@pytest.mark.parametrize(
    "change, reason",
    [
        (["--batch-size", 0], "--batch-size is 0"),
        (["--limit", 0], "--limit is 0"),
        (["--folder-fps", 0], "--folder-fps is 0"),
        (["--max-new-tokens", 0], "--max-new-tokens is 0"),
        (["--dtype", "float23"], "--dtype is 'float23'; choose one of: auto"),
    ],
)
def test_options_outside_their_range(checkpoint, questions, tmp_path, capsys, change, reason):
    assert main(arguments("questions", checkpoint, questions, tmp_path / "out", *change)) == 2
    assert reason in capsys.readouterr().err


def test_no_checkpoint(questions, tmp_path, capsys):
    assert main(arguments("questions", tmp_path / "absent", questions, tmp_path / "out")) == 2
    assert "is no checkpoint that can be loaded" in capsys.readouterr().err
