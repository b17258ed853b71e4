"""Measure methods on one step: time, peak memory, bytes kept between forward and backward, bytes saved by autograd.

A method that computes something at every layer may be measured at fewer (`count_layers`). The layers left out are
forwards only, all alike, and kept to the end. Their cost is added: for each the time of a layer's forward and the bytes
that a layer keeps. The peak comes after the last layer's forward, so those bytes add to it as they are.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.attention_loss.inputs import AT, Geometry, Replayed, Step, make_step
from benchmarks.attention_loss.methods import CAUSAL, LOSSES, METHODS, OURS, Method, run_step
from benchmarks.core import RecordFile, describe_machine
from benchmarks.memory import count_allocations, watch_saved
from swim_kernels.flash_noun_attention.providers.torch import TorchCpu

ATTENTION = "attention"


@dataclass(frozen=True)
class Record:
    """A row of the CSV. Bytes and seconds are those of `layers` layers; `measured_…` those of `layers_measured`."""

    length: int
    rows: int
    method: str
    grid: str
    layers: int
    layers_measured: int
    rounds: int
    seconds: float  # median of the rounds
    measured_seconds: float
    peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    kept_bytes: int | None = None  # by the allocator, at the end of the forward
    saved_bytes: int | None = None  # by autograd
    largest_saved: str = ""
    full_size_saved: str = ""  # the largest saved floating-point tensor, if of Hq x R x video or Hq x L x D or more
    dtype: str = ""
    cpu: str = ""
    threads: int = 0
    torch: str = ""
    python: str = ""


def open_records(path: Path) -> RecordFile[Record]:
    return RecordFile(path, Record, "length", "rows", "method")


@dataclass
class Memory:
    """Bytes of one run, above what was there before."""

    peak: int = 0
    kept: int = 0
    saved: int = 0
    kept_by_layer: int = 0
    saved_by_layer: int = 0
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()


class Run:
    """A method on one step, forward and backward, with `num_layers` of its layers."""

    def __init__(self, name: str, step: Step, method: Method, num_layers: int, rounds: int = 1):
        self.name, self.step, self.method, self.num_layers, self.rounds = name, step, method, num_layers, rounds
        self.on_layer: Callable[[], None] = lambda: None
        self.between: Callable[[], None] = lambda: None
        self.clock: list[float] = []  # of the latest run: its start and the end of each layer's forward
        self.memory = Memory()  # of the latest counted run

    def __call__(self, step: Step) -> None:
        self.clock = [time.perf_counter()]
        run_step(step, self.method.forward, self.num_layers, done=self._done, between=self.between)

    def _done(self) -> None:
        self.clock.append(time.perf_counter())
        self.on_layer()

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors that exist before a run."""
        return self.step.tensors()

    def time(self) -> float:
        """Return the seconds of one run, with new queries and targets."""
        step = self.step.fresh()
        gc.collect()
        gc.disable()
        try:
            since = time.perf_counter()
            self(step)
            return time.perf_counter() - since
        finally:
            gc.enable()

    def count(self) -> float:
        """Fill in `memory` during one run and return its seconds, to which counting adds 1 to 3 %."""
        with count_memory(self) as self.memory:
            return self.time()

    def record(self, seconds: float) -> Record:
        """Return the record of runs that took `seconds`, with the layers added that were not measured."""
        layers, memory = self.method.num_layers(self.step.geometry), self.memory
        missing = layers - self.num_layers
        layer_seconds = [b - a for a, b in zip(self.clock, self.clock[1:], strict=False)]
        return Record(
            length=self.step.length,
            rows=len(self.step.queries),
            method=self.name,
            layers=layers,
            layers_measured=self.num_layers,
            rounds=self.rounds,
            seconds=seconds + missing * statistics.median(layer_seconds) if missing else seconds,
            measured_seconds=seconds,
            peak_bytes=memory.peak + missing * memory.kept_by_layer,
            measured_peak_bytes=memory.peak,
            kept_bytes=memory.kept + missing * memory.kept_by_layer,
            saved_bytes=memory.saved + missing * memory.saved_by_layer,
            largest_saved=_format_shape(memory.shapes[0]) if memory.shapes else "",
            full_size_saved=find_full_size(memory.shapes, self.step),
            **_describe(self.step),
        )


class LossRun(Run):
    """A mask loss by itself, forward and backward, on given maps."""

    def __init__(self, name: str, step: Step, rounds: int = 3):
        layers = step.geometry.supervised
        super().__init__(name, step, METHODS[OURS], layers, rounds)
        generator = torch.Generator().manual_seed(0)
        shape = len(step.queries), step.queries.key_sets.shape[1]
        self.loss = LOSSES[name]
        self.maps = [torch.randn(shape, generator=generator).softmax(-1) for _ in range(layers)]

    def __call__(self, step: Step) -> None:
        maps = [layer.detach().requires_grad_() for layer in self.maps]
        loss = self.loss(maps, step)
        self.between()
        loss.backward()

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *self.maps]


class AttentionRun(Run):
    """The flash attention of one layer, forward and backward: the yardstick. `replayed` hands out its results."""

    def __init__(self, step: Step, rounds: int = 1):
        super().__init__(ATTENTION, step, METHODS[OURS], 1, rounds)
        self.replayed = Replayed(TorchCpu())

    def __call__(self, step: Step) -> None:
        self.replayed.compute(step)

    def count(self) -> float:
        return self.time()

    def record(self, seconds: float) -> Record:
        timed = {"rounds": self.rounds, "seconds": seconds, "measured_seconds": seconds}
        layers = {"layers": 1, "layers_measured": 1}
        return Record(length=self.step.length, rows=0, method=ATTENTION, **layers, **timed, **_describe(self.step))


def _describe(step: Step) -> dict[str, object]:
    """Return the columns that say on what and where."""
    dtype = str(step.grad_output.dtype).removeprefix("torch.")
    return {"grid": "{} x {}".format(*step.grid), "dtype": dtype, **describe_machine()}


def measure(runs: Sequence[Run]) -> Iterator[Record]:
    """Time the runs in turn, round by round, so that a drift of the machine meets all alike; then count their memory.

    A run of one round is slow, and is timed and counted at once. Each record comes as soon as it is complete.
    """
    seconds: dict[str, list[float]] = {run.name: [] for run in runs}
    for index in range(max(run.rounds for run in runs)):
        for run in runs:
            if index < run.rounds:
                seconds[run.name].append(run.count() if run.rounds == 1 else run.time())
            if index == run.rounds - 1:
                if run.rounds > 1:
                    run.count()
                yield run.record(statistics.median(seconds[run.name]))


def measure_all(lengths: Sequence[int], all_rows: Sequence[int], rounds: int | None, budget: int, path: Path) -> None:
    """Measure every length and the mask losses, each in a process of its own, since the largest take all of 24 GiB.

    Arguments are those of `measure_length`; records are written to `path` at once.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"other work is running (load average {load:.1f}): times, and so ratios of times, may be off", flush=True)
    context = multiprocessing.get_context("spawn")
    for length in [*lengths, None]:
        process = context.Process(target=_measure_part, args=(length, all_rows, rounds, budget, path))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"measuring {'the mask losses' if length is None else f'{length:,} tokens'} failed")


def _measure_part(length: int | None, all_rows: Sequence[int], rounds: int | None, budget: int, path: Path) -> None:
    if length is None:
        step = make_step(*AT)
        records = measure([LossRun(name, step, rounds or 3) for name in LOSSES])
    else:
        records = measure_length(length, all_rows, rounds, budget)
    file = open_records(path)
    for record in records:
        file.put(record)
        print(f"{record.length:,} tokens, {record.rows} rows, {record.method}: {record.seconds:.2f} s", flush=True)


def measure_length(
    length: int, all_rows: Sequence[int], rounds: int | None, budget: int, geometry: Geometry | None = None
) -> Iterator[Record]:
    """Measure the flash attention and what each method adds to it, with each number of rows.

    Args:
        rounds: of everything; None: one of what is slow, three of the rest.
        budget: bytes; a method that keeps more is measured at fewer layers.
    """
    base = make_step(length, 1, geometry)
    attention = AttentionRun(base, rounds or 1)
    base = replace(base, attention=attention.replayed)
    runs: list[Run] = [attention]
    for num_rows in all_rows:
        step = base.with_rows(num_rows)
        for name, method in METHODS.items():
            layers = count_layers(step, method, budget)
            if missing := describe_missing_memory(step, method, layers):
                print(f"{name}, {num_rows} rows: {missing}", flush=True)
            else:
                runs.append(Run(name, step, method, layers, rounds or method.rounds(num_rows)))
        for record in measure(runs):
            yield record
            own = record.method in (OURS, CAUSAL)
            assert not own or not record.full_size_saved, f"{record.method} saves {record.full_size_saved}"
        runs.clear()


def count_layers(step: Step, method: Method, budget: int) -> int:
    """Return all layers of a method if what they keep fits into `budget` bytes; else a quarter, or the supervised."""
    geometry = step.geometry
    layers = method.num_layers(geometry)
    if not method.every_layer:
        return layers
    fitting = [n for n in (layers, layers // 4) if n * _layer_bytes(step, method) + _loss_bytes(step) <= budget]
    return max([*fitting, geometry.supervised])


def describe_missing_memory(step: Step, method: Method, layers: int) -> str | None:
    """Return why a method in plain operations does not fit into this machine's memory; None if it does."""
    path = Path("/proc/meminfo")
    if method in (METHODS[OURS], METHODS[CAUSAL]) or not path.exists():
        return None
    available = next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    # backward of one layer takes three times what the layer keeps; of the loss as much as is kept
    needed = (layers + 3) * _layer_bytes(step, method) + 2 * _loss_bytes(step)
    if needed <= available * 1024:
        return None
    return f"{step.length:,} tokens: needs about {needed / 2**30:.0f} GiB, {available / 2**20:.0f} GiB are available"


def _layer_bytes(step: Step, method: Method) -> int:
    """Return what a layer keeps: the softmax in fp32, the same rounded, and at every layer the repeated keys."""
    geometry, size = step.geometry, step.grad_output.element_size()
    rows = geometry.text if method.text_rows else len(step.queries)
    repeated = geometry.head_dim * size if method.every_layer else 0
    return geometry.num_heads * step.length * (rows * (4 + size) + repeated)


def _loss_bytes(step: Step) -> int:
    """Return the bytes of the upsampled predictions and the masks in fp32."""
    return math.prod(step.geometry.mask_size) * 4 * (len(step.targets) + len(step.masks))


@contextmanager
def count_memory(run: Run) -> Iterator[Memory]:
    """Count the run that is made in the block; the `Memory` is filled in at its end."""
    memory, saved_after = Memory(), []
    with count_allocations() as counted, watch_saved(run.tensors()) as saved:

        def on_layer():
            counted.mark(f"layer {len(saved_after)}")
            saved_after.append(saved.bytes)

        def between():
            counted.mark("forward")
            memory.saved, memory.shapes = saved.bytes, tuple(saved.shapes())

        run.on_layer, run.between = on_layer, between
        yield memory
    run.on_layer = run.between = lambda: None
    memory.peak, memory.kept = counted.peak, counted.held["forward"]
    if len(saved_after) > 1:
        memory.kept_by_layer = counted.held["layer 1"] - counted.held["layer 0"]
        memory.saved_by_layer = saved_after[1] - saved_after[0]


def find_full_size(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], step: Step) -> str:
    """Return the largest floating-point tensor that is as large as all rows' probabilities or as a layer's query."""
    geometry = step.geometry
    probabilities = geometry.num_heads * step.queries.key_sets.shape[1] * len(step.queries)
    least = min(probabilities, geometry.num_heads * step.length * geometry.head_dim)
    found = [(shape, dtype) for shape, dtype in shapes if dtype.is_floating_point and math.prod(shape) >= least]
    return _format_shape(max(found, key=lambda saved: math.prod(saved[0]))) if found else ""


def _format_shape(saved: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = saved
    return f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
