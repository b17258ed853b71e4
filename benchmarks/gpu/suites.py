"""Parts that are tests of the project, run by pytest in several processes: kernels, providers, model, trainer.

A process that dies (an illegal memory access ends all work of its process) costs the test that it was in; another one
runs the rest.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.checks import FAIL, PASS, SKIP, CheckLog, Options

ROOT = Path(__file__).parents[2]
TRITON = "tests/kernels/triton_interpreter"
KERNELS = [f"{TRITON}/test_{name}.py" for name in ("triton_values", "triton_graph", "grid_prediction_triton")]
KERNELS += [f"{TRITON}/test_{name}_triton.py" for name in ("mask_bce", "grid_metrics", "flash_noun_attention")]
KERNELS += [f"{TRITON}/test_{name}_triton.py" for name in ("noun_attention_heads", "noun_mass")]
SUITES = {
    "kernels": ["tests/kernels/test_real_sizes.py", *KERNELS],
    "providers": ["tests/kernels/test_flash_providers.py"],
    "model": ["tests/gpu/test_model.py"],
    "trainer": ["tests/gpu/test_trainer.py"],
}
ALONE = ("offsets_beyond", "gigabytes")  # they take most of the memory: one after the other, when no other test runs
SLOW_ON_CPU = ("gigabytes", "registered", "many_rows", "compiled", "added_to", "splits", "head_dims", "float64[several")
LONGEST = 60  # seconds that a test may have run when time is over and not have failed


@dataclass
class Results:
    """Outcomes of the tests so far, and when those under way began.

    Attributes:
        outcomes: node id → status and detail.
        begun: node id → time.
    """

    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)
    begun: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def run(options: Options, log: CheckLog) -> None:
    deadline = time.monotonic() + options.seconds
    tests = collect(log.part, options)
    results = Results()
    alone = [test for test in tests if any(word in test for word in ALONE)]
    others = [test for test in tests if test not in alone]
    workers = count_workers(options.device)
    size = max(1, -(-len(others) // (3 * workers)))
    chunks = [others[first : first + size] for first in range(0, len(others), size)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda chunk: run_tests(chunk, options, deadline, results), chunks))
    run_tests(alone, options, deadline, results)
    for test in tests:
        status, detail = results.outcomes.get(test, (SKIP, f"no time left of {options.seconds:.0f} s"))
        log.add(test.rpartition("/")[2], status, detail, results.seconds.get(test, 0.0))


def count_workers(device: str) -> int:
    """Return the processes: compilation is their work on a GPU, and each takes a gigabyte of its memory."""
    return 1 if device == "cpu" else max(1, min(16, len(os.sched_getaffinity(0)) - 1))


def collect(part: str, options: Options) -> list[str]:
    """Return the tests of a part; with `quick`, and of the kernels on the CPU, one of each function."""
    words = [*pytest_words(options), "--collect-only", *SUITES[part]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=options.seconds)
    tests = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    if done.returncode or not tests:
        raise RuntimeError(f"pytest collects nothing: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    brief = part == "kernels" and options.device == "cpu"
    if brief:
        tests = [test for test in tests if not any(word in test.partition("::")[2] for word in SLOW_ON_CPU)]
    if brief or options.quick:
        tests = list({test.partition("[")[0]: test for test in reversed(tests)}.values())[::-1]
    return tests


def pytest_words(options: Options) -> list[str]:
    words = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.pytest_plugin", "-p", "no:cacheprovider"]
    return [
        *words,
        "-m",
        "",
        "--device",
        options.device,
        *["--ignore-values", "--assert=plain"] * options.ignore_values,
    ]


def run_tests(tests: list[str], options: Options, deadline: float, results: Results) -> None:
    """Run tests until all have an outcome or time is over, in a new process after each that died."""
    while left := [test for test in tests if test not in results.outcomes]:
        if time.monotonic() > deadline - 5:
            return
        known = len(results.outcomes)
        code = run_process(left, options, deadline, results)
        with results.lock:
            under_way = [test for test in left if test in results.begun and test not in results.outcomes]
            for test in under_way:
                ran = time.monotonic() - results.begun.pop(test)
                if code is not None:
                    results.outcomes[test] = FAIL, f"its process ended with code {code}"
                elif ran > LONGEST:
                    results.outcomes[test] = FAIL, f"had not ended after {ran:.0f} s"
        if len(results.outcomes) == known and code is not None:  # it does not even start
            raise RuntimeError(f"pytest ended with code {code} before any test")


def run_process(tests: list[str], options: Options, deadline: float, results: Results) -> int | None:
    """Run tests in one process, filling in `results`; return its exit code, None if time was over."""
    read, write = os.pipe()
    words = [*pytest_words(options), "--events", str(write), *tests]
    process = subprocess.Popen(words, cwd=ROOT, stdout=sys.stdout, stderr=sys.stderr, pass_fds=[write])
    os.close(write)
    over = threading.Event()
    timer = threading.Timer(max(1.0, deadline - time.monotonic()), lambda: (over.set(), process.kill()))
    timer.start()
    with os.fdopen(read, encoding="utf-8") as events:
        for line in events:
            event = json.loads(line)
            with results.lock:
                if event["status"] is None:
                    results.begun[event["test"]] = time.monotonic()
                else:
                    results.outcomes[event["test"]] = event["status"], event["detail"]
                    results.seconds[event["test"]] = event["seconds"]
    code = process.wait()
    timer.cancel()
    return None if over.is_set() else code


def tell(report) -> tuple[str, str] | None:
    """Return status and detail of a phase of a test as pytest reports it, None if the phase decides nothing."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return SKIP, reason.removeprefix("Skipped: ")
    if report.failed:
        lines = collections.deque((line for line in report.longreprtext.splitlines() if line.strip()), maxlen=1)
        crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
        return FAIL, (crash.splitlines()[0] if crash else "".join(lines))[:300]
    return (PASS, "") if report.when == "call" else None
