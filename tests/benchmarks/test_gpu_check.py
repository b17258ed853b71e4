"""The check for GPUs: its report, crashes of a part and of a test, byte floors, and a run on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report, suites
from benchmarks.gpu.checks import FAIL, MISS, PASS, SKIP, Check, CheckLog, Options, read_checks
from benchmarks.gpu.layers import Launch, floor_bytes, random_loss, random_rows
from benchmarks.gpu.part import PARTS, Part
from benchmarks.gpu.suites import Results, run_tests

ROOT = command.ROOT


def test_a_failure_is_told_and_decides_the_exit_code(tmp_path, capsys):
    fine = [Check("kernels", "a", PASS), Check("kernels", "b", SKIP, "no GPU"), Check("kernels", "c", SKIP, "no GPU")]
    assert report.write_report(tmp_path, [*fine, Check("benchmark", "k", MISS, "40 %")], "cpu", 3.0) == 0
    text = (tmp_path / report.REPORT).read_text()
    assert "- kernels: b and 1 more — no GPU" in text and "- benchmark: k — 40 %" in text
    assert "**PASS**: 1 PASS, 1 MISS, 2 SKIP in 3 s" in text
    assert report.write_report(tmp_path, [*fine, Check("model", "m", FAIL, "wrong")], "cpu", 3.0) == 1
    assert "- model: m — wrong" in capsys.readouterr().out
    assert json.loads((tmp_path / report.CHECKS).read_text())["verdict"] == FAIL
    assert report.write_report(tmp_path, fine[1:], "cpu", 3.0) == 1  # nothing passed


def test_an_error_is_a_failed_check(tmp_path):
    log = CheckLog("model", tmp_path / "model.jsonl")
    with log.judge("a") as detail:
        detail.append("seen")
    with log.judge("b"):
        raise ValueError("no\nmore")
    assert [(c.name, c.status, c.detail) for c in read_checks(log.path)] == [
        ("a", PASS, "seen"),
        ("b", FAIL, "ValueError: no"),
    ]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("import os; os.abort()", "signal SIGABRT"),
        ("raise SystemExit('broken')", "exit code 1: broken"),
        ("import time; time.sleep(60)", "stopped after"),
        ("pass", "it checked nothing"),
    ],
)
def test_a_part_that_dies_is_one_failure(what, told, tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "model", Part("suites", 10, False, ""))
    popen = subprocess.Popen
    monkeypatch.setattr(command.subprocess, "Popen", lambda words, **how: popen([sys.executable, "-c", what], **how))
    wait = popen.wait
    monkeypatch.setattr(popen, "wait", lambda process, timeout=None: wait(process, timeout and 2))
    args = argparse.Namespace(device="cpu", quick=False, ignore_values=False, minutes=9)
    (found,) = command.run_part("model", args, tmp_path, 100)
    assert found.status == FAIL and told in found.detail


def test_no_time_left_is_a_skip(tmp_path):
    args = argparse.Namespace(device="cpu", quick=False, ignore_values=False, minutes=9)
    (found,) = command.run_part("model", args, tmp_path, 4)
    assert found.status == SKIP and "no time left of 9 minutes" in found.detail


def test_a_test_that_kills_its_process_costs_itself_alone(tmp_path, monkeypatch):
    (tmp_path / "test_a.py").write_text(
        "import os, pytest\n"
        "def test_one(): pass\n"
        "def test_two(): os.abort()\n"
        "def test_three(): assert 1 == 2, 'wrong'\n"
        "def test_four(): pytest.skip('not here')\n"
        "def test_five(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_six(): pass\n"
    )
    words = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.pytest_plugin", "-p", "no:cacheprovider"]
    monkeypatch.setattr(suites, "pytest_words", lambda options: [*words, "-c", os.devnull, "--rootdir", str(tmp_path)])
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    options, results = Options("cpu", False, False, tmp_path, 60), Results()
    names = ("one", "two", "three", "four", "five", "six")
    run_tests([f"test_a.py::test_{name}" for name in names], options, time.monotonic() + 60, results)
    found = {test.rpartition("_")[2]: outcome for test, outcome in results.outcomes.items()}
    assert [found[name][0] for name in names] == [PASS, FAIL, FAIL, SKIP, FAIL, PASS]
    assert "its process ended with code -6" in found["two"][1] and "wrong" in found["three"][1]
    assert found["four"][1] == "not here" and "illegal memory access" in found["five"][1]


def test_floor_counts_every_needed_byte_once():
    length, queries = 200, random_rows(3, 200, True, 0, "cpu")
    query, key = (torch.zeros(1, heads, length, 16, dtype=torch.bfloat16) for heads in (4, 2))
    used = 16 * (length * 9 // 10 // 16)  # keys of the video
    maps = torch.zeros(3, 11)
    launch = Launch("maps", None, (1,), {"query": query, "key": key, "maps": maps, "scale": 1.0})
    assert floor_bytes(launch, queries) == 2 * 16 * (3 * 4 + used * 2) + maps.numel() * 4
    added = Launch("key_gradients", None, (1,), {"key": key, "grad_key": key, "ADD": True})
    assert floor_bytes(added, queries) == 3 * 2 * 16 * used * 2
    fresh = Launch("key_gradients", None, (1,), {"grad_key": key, "ADD": False})
    assert floor_bytes(fresh, queries) == key.numel() * 2
    layers = Launch("prediction", None, (1,), {"maps": (maps, maps), "table": torch.zeros(3, dtype=torch.int64)})
    assert floor_bytes(layers, queries) == 2 * maps.numel() * 4 + 3 * 8


def test_loss_of_random_rows():
    queries = random_rows(5, 100, True, 0, "cpu")
    queries.check(1, 100)
    random_rows(5, 100, False, 0, "cpu").check(1, 100)
    maps = torch.rand(5, queries.key_sets.shape[1], requires_grad=True)
    random_loss(maps, queries, (20, 30)).backward()
    assert maps.grad.isfinite().all()


def check(*words) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "swim_fast.gpu_check", "--device", "cpu", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_environment_on_the_cpu(tmp_path):
    done = check("--only", "environment", "sanitizer", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "**PASS**: 5 PASS" in done.stdout and "commit" in done.stdout
    checks = json.loads((tmp_path / report.CHECKS).read_text())["checks"]
    assert {c["part"] for c in checks} == {"environment", "sanitizer"}


@pytest.mark.slow
def test_all_of_it_on_the_cpu(tmp_path):
    done = check("--output", tmp_path, "--minutes", 20)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [Check(**c) for c in json.loads((tmp_path / report.CHECKS).read_text())["checks"]]
    assert {c.part for c in checks if c.status == PASS} == set(PARTS) - {"sanitizer"}
    assert (tmp_path / "gpu_benchmark.csv").read_text().count("\n") > 20
