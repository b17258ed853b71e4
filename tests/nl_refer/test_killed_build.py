"""Runs of the real command, killed at random points: nothing is lost, nothing that was kept is paid for twice."""

import json
import random
import signal
import subprocess
import time

from tests.helpers.fake_openai import FakeOpenAI, raw_record, serving, tagged
from tests.training.conftest import command, environment

COUNT, CONCURRENCY = 160, 4


def start(source, out, url):
    arguments = ["nl-refer", "build", source, out, "--rewriter", "openai", "--model", "fake", "--base-url", url]
    arguments += ["--concurrency", str(CONCURRENCY), "--timeout", "5"]
    return subprocess.Popen(
        command(*map(str, arguments)),
        env={**environment(), "OPENAI_API_KEY": "none"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kept(journal):
    """Numbers of the records whose answers are whole in the journal."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [json.loads(line)["record"] for line in lines]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def test_a_killed_build_resumes_where_it_was(tmp_path):
    source, out, journal = (tmp_path / name for name in ("raw.jsonl", "out.jsonl", "out.jsonl.journal.jsonl"))
    source.write_text("".join(json.dumps(raw_record(n)) + "\n" for n in range(COUNT)))
    rng = random.Random(11)
    # so slow that it is not over before Ctrl-C is heard
    server = FakeOpenAI({n: ["prose"] for n in range(0, COUNT, 7)}, delay=0.05)
    interruptions = [signal.SIGKILL, signal.SIGKILL, signal.SIGINT]
    with serving(server) as url:
        for number, how in enumerate(interruptions):
            reached = sum(server.requests.values()) + rng.randrange(8, 20)
            server.hold_from(reached)  # so that it is not over before the signal comes, however busy the machine
            process = start(source, out, url)
            wait_for(lambda reached=reached: sum(server.requests.values()) >= reached)
            process.send_signal(how)
            server.release()
            printed, _ = process.communicate(timeout=30)
            assert not out.exists()
            if how == signal.SIGINT:
                assert process.returncode == 130 and "Traceback" not in printed
                assert "the same command resumes" in printed and "swim-fast: interrupted" in printed
                # What was under way has been waited for.
                assert sum(server.answered.values()) - len(kept(journal)) <= number * CONCURRENCY
            in_journal = len(kept(journal))
            assert sum(server.requests.values()) - in_journal <= (number + 1) * CONCURRENCY
        with open(journal, "ab") as file:
            file.write(b'{"key": "torn off in the mid')
        process = start(source, out, url)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "the last line was torn off" in printed

    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry["conversations"][0]["value"] for entry in entries] == [tagged(n) for n in range(COUNT)]
    # Each record's answers are in the journal once: one, or two where the first was rejected (and not lost).
    answers = kept(journal)
    assert set(answers) == set(range(COUNT))
    assert all(answers.count(n) <= 1 + (n % 7 == 0) for n in range(COUNT))
    repeated = sum(server.requests.values()) - len(answers)
    assert 0 <= repeated <= 2 * CONCURRENCY, "only what was under way when it was killed is asked again"
