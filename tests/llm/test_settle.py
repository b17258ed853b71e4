"""What answers amount to, and one loop of asking against a local server; builds and judges test it at length."""

import pytest

from swim_fast.llm.journal import Answer, Journal
from swim_fast.llm.settle import AnswerError, Request, Settler, judge_answers
from swim_fast.options import Endpoint
from tests.helpers.fake_openai import TOKENS, FakeOpenAI, serving


class FinalError(AnswerError):
    final = True


def read(answer):
    if answer == "never":
        raise FinalError("there is none")
    if not answer.isdigit():
        raise AnswerError(f"{answer!r} is no number")
    return int(answer)


def request(index, key="key"):
    chat = [{"role": "system", "content": "count"}, {"role": "user", "content": f"clip {index}, {{1}}"}]
    return Request(index, f"{key}{index}", chat, read, tokens_out=5)


def test_answers_are_judged_in_order():
    asked = request(0)
    unasked = judge_answers(asked, [], 2)
    assert unasked.result is None and unasked.chat == asked.chat
    again = judge_answers(asked, ["one"], 2)
    assert [message["role"] for message in again.chat] == ["system", "user", "assistant", "user"]
    assert again.chat[2]["content"] == "one" and "'one' is no number" in again.chat[3]["content"]
    assert asked.chat == request(0).chat, "the request is not touched"
    given_up = judge_answers(asked, ["one", "two"], 2)
    assert (given_up.result, given_up.chat, given_up.reason) == (None, None, "'two' is no number")
    settled = judge_answers(asked, ["one", "7"], 2)
    assert (settled.result, settled.chat, settled.answers) == (7, None, ("one", "7"))
    final = judge_answers(asked, ["never"], 2)
    assert final.final and final.chat is None


def test_only_open_requests_are_asked(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    server = FakeOpenAI({1: ["long"], 2: ["digits"], 3: ["prose", "digits"]})
    server._digits = lambda text: "42"
    with serving(server) as url, Journal(tmp_path / "journal.jsonl") as journal:
        journal.add("key0", 0, Answer("7", 1, 1))
        options = Endpoint(model="m", base_url=url, concurrency=2, retries=0, timeout=5)
        settler = Settler(options, journal, attempts=2, prices=(1e6, 0))
        settler.estimate([request(4), None], 2, "asking", progress=False)
        assert (settler.usage.open, settler.usage.tokens_out) == (1, 5) and not server.requests
        settler = Settler(options, journal, attempts=2, prices=(1e6, 0))
        requests = [request(0), None, request(1), request(2), request(3)]
        settler.settle(iter(requests), len(requests), "asking", progress=False)
        outcomes = {r.index: settler.outcome(r) for r in requests if r}
    assert server.requests == {1: 1, 2: 1, 3: 2}
    assert {index: outcome.result for index, outcome in outcomes.items()} == {0: 7, 1: None, 2: 42, 3: 42}
    assert outcomes[1].refused and "refused by the endpoint: status 400" in outcomes[1].reason
    assert "record 1 is left out" in caplog.text
    usage = settler.usage
    assert (usage.settled_before, usage.open, usage.requests, usage.answers) == (1, 3, 4, 3)
    assert usage.cost == 3 * TOKENS[0]


@pytest.mark.parametrize("dry_run", [True, False])
def test_report(dry_run):
    settler = Settler(Endpoint(model="m"), None, 1, (2.0, 8.0))
    settler.usage.open, settler.usage.tokens_in, settler.usage.tokens_out = 3, 1_000_000, 500_000
    assert "1,000,000 tokens in, 500,000 out, cost 6.00" in "\n".join(settler.usage.lines(dry_run))
