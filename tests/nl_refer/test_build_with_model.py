"""The whole build through the real openai client against a local server that misbehaves."""

import json

import pytest

from swim_fast.cli import main
from swim_fast.data.source.records import RecordFile
from swim_fast.jobs import Build
from swim_fast.llm.endpoint import EndpointError
from swim_fast.nl_refer.build import build
from tests.helpers.fake_openai import TOKENS, FakeOpenAI, raw_record, serving, tagged


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(source, out, url, **changes):
    quick = {"concurrency": 4, "timeout": 0.7, "retries": 3, "backoff": 0.05, "model": "fake"}
    asked = {"rewriter": "openai", "base_url": url, "price_in": 2.0, "price_out": 8.0, "progress": False}
    return build(Build(file=source, out=out, **{**quick, **asked, **changes}))


def test_every_misbehaviour_is_survived(tmp_path, caplog):
    plan = {
        1: ["fenced"],
        2: ["prose", "two", "good"],
        3: ["limit", "good"],
        4: ["slow", "good"],
        5: ["drop", "good"],
        6: ["broken", "broken", "good"],
        7: ["garbage", "good"],
        8: ["invented"] * 9,
        9: ["unnamed"] * 9,
        10: ["long"],
    }
    server = FakeOpenAI(plan)
    text_only = {"index": "qa", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    source = write(tmp_path / "raw.jsonl", [*(raw_record(n) for n in range(12)), text_only])
    with serving(server) as url:
        report = rewrite(source, tmp_path / "out.jsonl", url)
    wanted = [0, 1, 2, 3, 4, 5, 6, 7, 11]
    out = read(tmp_path / "out.jsonl")
    assert [entry["index"] for entry in out] == [*(f"raw_{n}" for n in wanted), "qa"]
    assert [entry["conversations"][0]["value"] for entry in out[:-1]] == [tagged(n) for n in wanted]
    for entry, number in zip(out[:-1], wanted, strict=True):
        assert entry["conversations"][1] == raw_record(number)["conversations"][1]
        assert entry["annotation"] == raw_record(number)["annotation"]
    assert out[-1] == text_only
    assert len(list(RecordFile(tmp_path / "out.jsonl"))) == 10

    requests = {0: 1, 1: 1, 2: 3, 3: 2, 4: 2, 5: 2, 6: 3, 7: 2, 8: 3, 9: 1, 10: 1, 11: 1}
    assert server.requests == requests
    assert report.counts["rewritten"] == 9 and report.counts["passed"] == 1 and report.counts["failed"] == 3
    answers = sum(server.answered.values())
    assert (report.usage.requests, report.usage.answers) == (sum(requests.values()), answers)
    assert (report.usage.tokens_in, report.usage.tokens_out) == (answers * TOKENS[0], answers * TOKENS[1])
    assert f"cost {(answers * (2 * TOKENS[0] + 8 * TOKENS[1])) / 1e6:,.2f}" in str(report)

    # The rejected answer and its reason are in the chat that asks again.
    roles = [message["role"] for message in server.chats[2][2]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "no JSON object" in server.chats[2][1][3]["content"]
    assert "each of [1] is wanted once" in server.chats[2][2][5]["content"]
    # A rate limit holds back everybody.
    limited = server.limited[0]
    after = [moment for moments in server.moments.values() for moment in moments if moment > limited + 0.1]
    assert min(after) >= limited + 0.39
    assert 1 < server.most_at_once <= 4

    review = {entry["record"]: entry for entry in read(tmp_path / "out.jsonl.review.jsonl")}
    assert set(review) == {8, 9, 10}
    assert "'unicorn' does not occur" in review[8]["reason"] and "unicorn" in review[8]["answer"]
    assert "only pronouns" in review[9]["reason"]
    assert "status 400" in review[10]["reason"] and review[10]["answer"] is None
    assert review[8]["conversations"] == raw_record(8)["conversations"]
    assert "status 500" in caplog.text and "again in" in caplog.text and "no answer within 0.7 s" in caplog.text
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_the_same_command_again_asks_nothing_but_what_was_refused(tmp_path):
    server = FakeOpenAI({1: ["invented"] * 3, 2: ["long"]}, delay=0.05)
    source = write(tmp_path / "raw.jsonl", [raw_record(n) for n in range(5)])
    out = tmp_path / "out.json"
    with serving(server) as url:
        rewrite(source, out, url)
        first = json.loads(out.read_text())
        assert server.most_at_once == 4
        report = rewrite(source, out, url)
        assert server.requests == {0: 1, 1: 3, 2: 2, 3: 1, 4: 1}
        assert report.usage.settled_before == 4 and report.usage.open == 1
        assert report.usage.kept_in == 7 * TOKENS[0]
        assert [e["index"] for e in first] == ["raw_0", "raw_3", "raw_4"]
        assert [e["index"] for e in json.loads(out.read_text())] == ["raw_0", "raw_2", "raw_3", "raw_4"]
        # One more attempt is one more request; another model, record or place starts anew.
        rewrite(source, out, url, attempts=4)
        assert server.requests[1] == 4 and sum(server.requests.values()) == 9
        assert len(json.loads(out.read_text())) == 5 and not (tmp_path / "out.json.review.jsonl").exists()
        rewrite(source, out, url, model="other")
        assert sum(server.requests.values()) == 14
        changed = raw_record(3)
        changed["annotation"][0]["1"] = None
        write(source, [*(raw_record(n) for n in range(3)), changed, raw_record(4)])
        rewrite(source, out, url)
        assert sum(server.requests.values()) == 15 and server.requests[3] == 3


def test_nothing_is_paid_for_records_that_cannot_be_used(tmp_path):
    two_videos = raw_record(1, image="a.jpg")
    bad_masks = raw_record(2, annotation=[{"first": {}}])
    no_masks = raw_record(3, annotation=[])
    loose_masks = raw_record(4)
    loose_masks["conversations"][0]["value"] = "What is in clip 4?"
    in_answer = raw_record(5)
    in_answer["conversations"][1]["value"] = "<object1> moves."
    already = raw_record(6)
    already["conversations"][0]["value"] = tagged(6)
    source = write(
        tmp_path / "raw.jsonl", [raw_record(0), two_videos, bad_masks, no_masks, loose_masks, in_answer, already]
    )
    with open(source, "a") as file:
        file.write('{"index": "cut')
    server = FakeOpenAI()
    with serving(server) as url:
        report = rewrite(source, tmp_path / "out.jsonl", url)
    assert server.requests == {0: 1}
    out = read(tmp_path / "out.jsonl")
    assert [entry["index"] for entry in out] == ["raw_0", "raw_4", "raw_6"]
    assert out[1]["annotation"] == [] and out[2] == already
    reasons = [(entry["record"], entry["reason"]) for entry in read(tmp_path / "out.jsonl.review.jsonl")]
    assert [number for number, _ in reasons] == [1, 2, 3, 5, 7]
    for (_, reason), part in zip(
        reasons,
        ["both a video and an image", "not a frame number", "0 annotations", "in an answer", "malformed"],
        strict=True,
    ):
        assert part in reason
    assert report.counts["passed"] == 2 and report.counts["masks_left_out"] == 1


def test_an_endpoint_that_cannot_be_used_stops_the_run(tmp_path):
    source = write(tmp_path / "raw.jsonl", [raw_record(n) for n in range(30)])
    out = tmp_path / "out.jsonl"
    server = FakeOpenAI({5: ["denied"]})
    with serving(server) as url, pytest.raises(EndpointError, match="refuses all requests, status 401"):
        rewrite(source, out, url)
    assert sum(server.requests.values()) < 15 and not out.exists()
    assert len(read(tmp_path / "out.jsonl.journal.jsonl")) == sum(server.answered.values()) >= 3
    with pytest.raises(EndpointError, match="does not answer: APIConnectionError"):  # nobody listens there any more
        rewrite(source, out, url, retries=1)
    server = FakeOpenAI({n: ["limit"] for n in range(30)}, retry_after="3600")
    with serving(server) as url, pytest.raises(EndpointError, match="asks for 3600 s of patience"):
        rewrite(source, out, url)


def test_dry_run_asks_and_writes_nothing(tmp_path, capsys):
    source = write(tmp_path / "raw.jsonl", [raw_record(n) for n in range(8)])
    command = ["nl-refer", "build", str(source), str(tmp_path / "out.jsonl"), "--rewriter", "openai", "--model", "m"]
    command += ["--base-url", "http://127.0.0.1:9", "--price-in", "1000", "--limit", "6", "--dry-run"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "6 records to ask about" in out and "cost" in out
    assert list(tmp_path.iterdir()) == [source]


def test_options_that_do_not_go_together(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "raw.jsonl", [raw_record(0)])
    command = ["nl-refer", "build", str(source)]
    assert main([*command, str(tmp_path / "out.jsonl"), "--model", "m"]) == 2
    assert "--model needs --rewriter openai" in capsys.readouterr().err
    assert main([*command, str(source)]) == 2
    assert "is the input as well" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out.jsonl"), "--limit", "0"]) == 2
    assert "--limit is 0; it must be positive" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main([*command, str(tmp_path / "out.jsonl"), "--rewriter", "openai", "--model", "m"]) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert read(source) == [raw_record(0)]
