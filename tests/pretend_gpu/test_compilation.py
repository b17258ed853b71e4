"""Kernels of a run, compiled in the background at its start."""

import logging
import threading

import pytest
import torch

from benchmarks.kernels.fixed_builds import LAYERS
from swim_kernels import compile_in_background
from tests.helpers.pretend_gpu import record
from tests.pretend_gpu.kernel_batches import HEAD_DIM, HEADS, KEY_HEADS, Batches, SetBatches, builds, forget_builds

RUNS = [(fused, over) for fused in (True, False) for over in ("range", "set")]
RUN = {"num_heads": HEADS, "num_key_heads": KEY_HEADS, "head_dim": HEAD_DIM, "dtype": torch.bfloat16}


def count():
    return sum(map(len, builds().values()))


@pytest.mark.parametrize("fused, over", RUNS)
def test_batches_find_all_kernels_compiled(fused, over, caplog):
    forget_builds()
    caplog.set_level(logging.INFO)
    with record() as seen:
        thread = compile_in_background("cuda", **RUN, fused=fused, over=over, num_layers=LAYERS)
        thread.join()
    compiled = count()
    assert not [event for event in seen.of("launch") if event.name.startswith("triton ")]
    messages = [entry.message for entry in caplog.records if entry.name == "swim_kernels.compilation"]
    assert messages[0].endswith("in the background") and messages[1].startswith(f"compiled {compiled} kernels in ")
    batches = Batches(fused, over, seed=3)
    for _ in range(40):
        next(batches)
    assert count() == compiled > 8


def test_losses_of_questions_find_their_kernels_compiled():
    forget_builds()
    compile_in_background("cuda", **RUN, fused=False, num_layers=LAYERS, with_sets=True).join()
    compiled, batches = count(), SetBatches(False, "range", seed=3)
    for _ in range(40):
        next(batches)
    assert count() == compiled and "mass_partials_kernel" in builds()


def test_launches_meanwhile_are_run(caplog):
    forget_builds()
    thread = compile_in_background("cuda", **RUN, num_layers=LAYERS)
    with record() as seen:
        Batches(fused=True, over="set").run(num_rows=9, length=600)
    thread.join()
    assert "triton maps_kernel" in " ".join(event.name for event in seen.of("launch"))
    assert not caplog.records


def test_an_exception_is_told_and_ends_the_thread_alone(caplog):
    thread = compile_in_background("cuda", **RUN, fusion="unheard of")
    thread.join()
    assert "could not be compiled ahead" in caplog.text and "unheard of" in caplog.text
    assert thread not in threading.enumerate()
    Batches(fused=True, over="set").run(num_rows=9, length=600)
