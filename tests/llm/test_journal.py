"""The journal file: what is in it comes back, torn and damaged lines cost themselves alone."""

import json

import pytest

from swim_fast.llm.journal import Answer, Journal, answer_key

CHAT = [{"role": "user", "content": "?"}]


def test_answers_come_back_in_order(tmp_path):
    path = tmp_path / "folder" / "journal.jsonl"
    first, second, other = Answer("ä\n{", 3, 4), Answer("again", 5, 6), Answer("", 0, 0)
    with Journal(path) as journal:
        journal.add("a", 0, first)
        # On the disk at once: a process that is killed closes nothing.
        assert json.loads(path.read_text())["record"] == 0
        journal.add("b", 1, other)
        assert journal.answers("a") == [first]
        journal.add("a", 0, second)
        assert journal.answers("a") == [first, second] and journal.answers("c") == []
        assert len(path.read_text().splitlines()) == 3
    with Journal(path) as journal:
        assert journal.answers("a") == [first, second] and journal.answers("b") == [other]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line(tmp_path, cut, caplog):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(3):
            journal.add(str(number), number, Answer("answer", number, 1))
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    with Journal(path) as journal:
        assert journal.answers("1") == [Answer("answer", 1, 1)]
        # A line that lacks nothing but its end is whole.
        assert journal.answers("2") == ([Answer("answer", 2, 1)] if cut == 1 else [])
        assert ("torn off" in caplog.text) == (cut > 1)
        journal.add("3", 3, Answer("new", 0, 0))
    assert [json.loads(line)["record"] for line in path.read_text().splitlines()] == [0, 1, *([2] * (cut == 1)), 3]


def test_damaged_lines_are_passed_over(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add("a", 0, Answer("one", 1, 1))
    with open(path, "a") as file:
        file.write('\n{"key": 3}\nnot JSON\n')
    with Journal(path) as journal:
        journal.add("b", 1, Answer("two", 1, 1))
    with Journal(path) as journal:
        assert journal.answers("a")[0].answer == "one" and journal.answers("b")[0].answer == "two"
    assert "2 damaged lines" in caplog.text


def test_two_runs_cannot_share_a_journal(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path), pytest.raises(BlockingIOError, match="in use by another run"):
        Journal(path)
    Journal(path).close()


def test_keys_tell_apart_whatever_was_asked():
    record = {"conversations": ["ü"], "annotation": []}
    keys = [
        answer_key(0, record, "m", CHAT),
        answer_key(1, record, "m", CHAT),
        answer_key(0, {**record, "annotation": [1]}, "m", CHAT),
        answer_key(0, record, "n", CHAT),
        answer_key(0, record, "m", [*CHAT, *CHAT]),
    ]
    assert len(set(keys)) == 5
    assert keys[0] == answer_key(0, dict(reversed(record.items())), "m", CHAT)
