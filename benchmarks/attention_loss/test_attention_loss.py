"""What the attention loss costs beside flash attention, by three methods: `python -m pytest benchmarks`.

No figure is taken unless the methods agree first. The set-up is in `attention_loss_cases.py`, what is measured in
`attention_loss_measure.py`, table, picture and targets in `attention_loss_report.py`.
"""

from __future__ import annotations

import gc
from functools import partial

import pytest

from benchmarks.attention_loss.agreement import assert_methods_agree
from benchmarks.attention_loss.cases import METHODS, make_step, our_mask_loss, plain_mask_loss
from benchmarks.attention_loss.measure import (
    LOSS_OURS,
    LOSS_PLAIN,
    LossRun,
    Record,
    Run,
    Setting,
    attention_record,
    make_record,
    measure_memory,
    measured_layers,
    missing_memory,
)
from benchmarks.attention_loss.report import AT

pytestmark = [pytest.mark.timeout(1800), pytest.mark.benchmark(disable_gc=True)]


@pytest.fixture(scope="session", autouse=True)
def agreement():
    """That the methods compute the same thing, before anything is measured."""
    assert_methods_agree()


@pytest.fixture(scope="module")
def setting(length, request):
    """Inputs of one length and their attention; freed before those of the next are made."""
    yield Setting(length, folder=request.config.getoption("attention"))
    gc.collect()


def test_flash_attention(benchmark, setting, keep):
    """Of one layer, forward and backward, by itself: the yardstick, and what is replayed in the other tests."""
    if setting.has_attention:
        pytest.skip("measured by an earlier process")
    benchmark.pedantic(setting.compute_attention, rounds=1)
    setting.keep_attention()
    keep(attention_record(setting.step(1), benchmark.stats.stats.median))


@pytest.mark.parametrize("method", METHODS)
def test_attention_loss(benchmark, setting, num_rows, method, keep, request):
    """Time and memory that a method adds to the attention, which is replayed."""
    step, case = setting.step(num_rows), METHODS[method]
    budget = int(request.config.getoption("memory_gib") * 2**30)
    layers = measured_layers(step, case, budget)
    missing = missing_memory(step, case, layers)
    if missing:
        pytest.skip(missing)
    record = measure(benchmark, method, Run(step, case, layers), case.rounds(num_rows))
    keep(record)
    assert method != "this project" or not record.full_size_saved


@pytest.mark.parametrize("name", [LOSS_OURS, LOSS_PLAIN])
def test_mask_loss(benchmark, name, keep, request):
    """The mask loss by itself, at the length and the number of rows of the targets."""
    if any(at not in request.config.getoption(option) for at, option in zip(AT, ("lengths", "rows"), strict=True)):
        pytest.skip(f"measured at {AT[0]:,} tokens and {AT[1]} rows")
    losses = {LOSS_OURS: our_mask_loss, LOSS_PLAIN: partial(plain_mask_loss, numerics="stable")}
    keep(measure(benchmark, name, LossRun(make_step(*AT), losses[name]), rounds=3))


def measure(benchmark, name: str, run: Run, rounds: int) -> Record:
    """One round, of a slow method, is timed and counted at once, which adds 1 to 3 % to the time. Several are timed,
    and another run is counted."""
    if rounds == 1:
        with measure_memory(run) as memory:
            benchmark.pedantic(run, setup=run.set_up, rounds=1)
    else:
        benchmark.pedantic(run, setup=run.set_up, rounds=rounds)
        with measure_memory(run) as memory:
            run(*run.set_up()[0])
    return make_record(name, run, rounds, benchmark.stats.stats.median, memory)
