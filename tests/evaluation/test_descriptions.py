"""VideoRefer-Bench-D from the command line, with a judge on a local port."""

import json

import pytest

from swim_fast.cli import main
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile
from swim_fast.evaluation.descriptions import read_description
from swim_fast.evaluation.judge import DIMENSIONS
from swim_fast.evaluation.prompts import read_items
from tests.evaluation.conftest import arguments, description, lines, results
from tests.helpers.fake_openai import FakeOpenAI, serving


class FakeJudge(FakeOpenAI):
    """Scores clip n with `scores(n)`; besides the behaviours of `FakeOpenAI`: python, high, missing."""

    @staticmethod
    def scores(number: int) -> dict[str, int]:
        return {name: (number + i) % 6 for i, name in enumerate(DIMENSIONS)}

    def _of(self, text):
        return self.scores(int(text.split("clip ")[1].split()[0]))

    def _good(self, text):
        return json.dumps(self._of(text))

    def _python(self, text):
        return f"Here you are:\n```python\n{self._of(text)}\n```"

    def _high(self, text):
        return json.dumps({**self._of(text), DIMENSIONS[0]: 7})

    def _missing(self, text):
        return json.dumps({name: 1 for name in DIMENSIONS[1:]})


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def judged(url, *more):
    quick = ["--timeout", 1, "--backoff", 0.05, "--retries", 2, "--attempts", 2, "--concurrency", 3]
    return ["--judge-model", "fake-judge", "--base-url", url, *quick, *more]


def test_predictions_then_judge(checkpoint, descriptions, tmp_path, capsys, monkeypatch):
    words = arguments("descriptions", checkpoint, descriptions, tmp_path, "--max-new-tokens", 8)
    assert main(words) == 0
    found = results(tmp_path)
    assert found["described"] == 5 and found["means"] is None and list(found["problems"]) == ["5"]
    assert "judge" not in found["settings"] and not (tmp_path / "scores.jsonl").exists()
    kept = lines(tmp_path / "predictions-rank0.jsonl")
    said = {entry["record"]: entry["description"] for entry in kept if "description" in entry}
    assert sorted(said) == [0, 1, 2, 3, 4]
    capsys.readouterr()

    # The judge alone: no model is loaded, whatever the options of the model are.
    monkeypatch.setattr("swim_fast.evaluation.run.load_checkpoint", None)
    plan = {1: ["python"], 2: ["high", "missing", "good"], 3: ["high", "good"], 4: ["broken", "good"]}
    server = FakeJudge(plan)
    only = [*arguments("descriptions", checkpoint, descriptions, tmp_path, "--judge-only", "--max-frames", 8)]
    with serving(server) as url:
        assert main([*only, *map(str, judged(url, "--temperature", 0.5))]) == 0
        assert server.requests == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2}
        for number, chats in server.chats.items():
            assert chats[0][1]["content"] == (
                f"##Correct answer: The square of clip {number} moves to the right.\n"
                f"##Predicted answer: {said[number]}\n"
            )
        again = server.chats[2][1]
        assert [message["role"] for message in again] == ["system", "user", "assistant", "user"]
        assert "Subject Correspondence is 7; it must be a whole number from 0 to 5" in again[3]["content"]
        # All answers are in the journal, the rejected ones too: nothing is paid for twice.
        assert main([*only, *map(str, judged(url, "--temperature", 0.5))]) == 0
        assert sum(server.requests.values()) == 8
        # Another temperature is another judge.
        assert main([*only, *map(str, judged(url, "--temperature", 0, "--limit", 1))]) == 0
        assert server.requests[0] == 2 and results(tmp_path)["average"] == pytest.approx(1.5)
        assert main([*only, *map(str, judged(url, "--temperature", 0.5))]) == 0
        assert sum(server.requests.values()) == 9

    found = results(tmp_path)
    assert list(found["scores"]) == ["0", "1", "3", "4"] and list(found["failed"]) == ["2"]
    assert "no score for Subject Correspondence" in found["failed"]["2"]
    expected = {name: sum(FakeJudge.scores(n)[name] for n in (0, 1, 3, 4)) / 4 for name in DIMENSIONS}
    assert found["means"] == expected
    assert found["average"] == pytest.approx(sum(expected.values()) / 4)
    rows = lines(tmp_path / "scores.jsonl")
    about = {"judge": "fake-judge", "judge_temperature": 0.5, "judge_prompt": "swim-fast 1", "frame_mode": "text"}
    assert rows[0] == {"record": 0, **FakeJudge.scores(0), **about}
    assert rows[2]["record"] == 2 and set(rows[2]) == {"record", "failed", *about}
    printed = capsys.readouterr().out
    assert "object named in words; up to 4 frames; judge fake-judge, temperature 0.5, prompt swim-fast 1" in printed
    assert f"{found['average']:.2f}" in printed and "multi; mask as input; judge GPT-4o" in printed
    assert "1 descriptions without scores, which count nowhere" in printed
    assert "VideoRefer-Bench-D.json, a plain benchmark file: 6 with words without tags\n" in printed
    text, mask = (printed.index(f"{model} (published)") for model in ("SWIM-7B", "DAM-8B"))
    assert text < mask and "| 3.78 | object named in words; judge GPT-4o" in printed[text:mask]


def read(tmp_path, *records):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(records))
    return read_items(RecordFile(path), range(len(records)), read_description)


def test_the_refined_file_asks_in_its_conversations(tmp_path):
    said = [
        {"from": "human", "value": "<video>\nDescribe the <ins>cub</ins> lying on the left."},
        {"from": "gpt", "value": "The <ins>cub</ins> is lying down."},
    ]
    conversation = description(0, "a.mp4", Question=None, caption=None, conversations=said, annotation=[{}, {}])
    items, problems, kind = read(tmp_path, conversation, {**conversation, "caption": "A <ins>cub</ins>."})
    assert not problems and kind == "refined benchmark file: 2 with tagged nouns"
    assert items[0].record.turns[0].text == "Describe the cub lying on the left."
    assert [item.caption for item in items.values()] == ["The cub is lying down.", "A cub."]
    with pytest.raises(DataError, match="there is no question.*raw benchmark.*-D.json"):
        read(tmp_path, description(0, "a.mp4", Question=None))


def test_judge_only_wants_predictions_of_this_model(checkpoint, descriptions, tmp_path, capsys):
    only = arguments("descriptions", checkpoint, descriptions, tmp_path, "--judge-only")
    assert main(only) == 2
    assert "needs a --judge-model" in capsys.readouterr().err
    assert main([*only, "--judge-model", "m", "--base-url", "http://localhost:9/v1"]) == 2
    assert "holds no predictions to judge" in capsys.readouterr().err
    assert main(arguments("descriptions", checkpoint, descriptions, tmp_path, "--max-new-tokens", 2)) == 0
    other = arguments("descriptions", "another/model", descriptions, tmp_path, "--judge-only")
    assert main([*other, "--judge-model", "m", "--base-url", "http://localhost:9/v1"]) == 2
    assert "model was" in capsys.readouterr().err


def test_a_judge_that_refuses_everybody(checkpoint, descriptions, tmp_path, capsys):
    words = arguments("descriptions", checkpoint, descriptions, tmp_path, "--max-new-tokens", 2, "--limit", 3)
    with serving(FakeJudge({n: ["denied"] for n in range(3)})) as url:
        assert main([*words, *map(str, judged(url))]) == 2
    assert "refuses all requests" in capsys.readouterr().err
    with serving(FakeJudge({1: ["long"]})) as url:  # the descriptions are there; one of them is refused
        assert main([*words, *map(str, judged(url))]) == 0
    found = results(tmp_path)
    assert list(found["scores"]) == ["0", "2"] and "refused by the endpoint" in found["failed"]["1"]
