"""Measures one method of `attention_loss_cases` on one step: time, peak, what is kept, what autograd saved.

A method that computes something at every layer may be measured at fewer (`measured_layers`). The layers left out are
forwards only, all alike, and kept to the end. What they cost is added: for each the time of a layer's forward and the
bytes that a layer keeps. The peak comes after the last layer's forward, so those bytes add to it as they are.
"""

from __future__ import annotations

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from benchmarks.attention_loss.cases import (
    Geometry,
    MethodCase,
    Replayed,
    Step,
    make_step,
    run_step,
    supervision,
    this_project,
)
from benchmarks.memory import count_allocations, watch_saved
from swim_kernels.flash_noun_attention.providers.torch import TorchCpu

ATTENTION, LOSS_OURS, LOSS_PLAIN = "attention", "mask loss, this project", "mask loss, plain"


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
    seconds: float  # the median of the rounds
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

    def row(self) -> dict[str, object]:
        return {name: "" if value is None else value for name, value in asdict(self).items()}

    @classmethod
    def parse(cls, row: dict[str, str]) -> Record:
        """From a row of the file."""
        values: dict[str, object] = {}
        for field in fields(cls):
            text = row[field.name]
            if field.type.startswith(("int", "float")):
                values[field.name] = (float if field.type == "float" else int)(text) if text else None
            else:
                values[field.name] = text
        return cls(**values)


def conditions(step: Step) -> dict[str, object]:
    """The columns that say where and with what."""
    return {
        "grid": "{} x {}".format(*step.grid),
        "dtype": str(step.grad_output.dtype).removeprefix("torch."),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Setting:
    """A step of one length, whose attention is computed once and replayed.

    With a folder, it is kept there for the processes to come.
    """

    def __init__(
        self,
        length: int,
        geometry: Geometry | None = None,
        dtype: torch.dtype = torch.bfloat16,
        folder: Path | None = None,
    ):
        self._step = make_step(length, 1, geometry, dtype=dtype)
        self._file = folder and folder / f"attention-{length}.pt"
        found = self._file is not None and self._file.exists()
        self._attention: Replayed | None = torch.load(self._file, weights_only=False) if found else None

    @property
    def length(self) -> int:
        return self._step.length

    @property
    def has_attention(self) -> bool:
        return self._attention is not None

    def compute_attention(self) -> None:
        """Forward and backward of the flash attention of one layer."""
        self._attention = Replayed(TorchCpu(), self._step)

    def keep_attention(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self._attention, self._file)

    def step(self, num_rows: int) -> Step:
        if self._attention is None:
            self.compute_attention()
        changed = supervision(self.length, num_rows, self._step.geometry, self._step.grid)
        return replace(self._step, attention=self._attention, **changed)


def measured_layers(step: Step, case: MethodCase, budget: int) -> int:
    """All layers of the method if what it keeps fits into `budget` bytes; else a quarter, or the supervised ones."""
    geometry = step.geometry
    layers = case.num_layers(geometry)
    if not case.every_layer:
        return layers
    fitting = [n for n in (layers, layers // 4) if n * _kept_by_layer(step, case) + _pixels(step) <= budget]
    return max([*fitting, geometry.supervised])


def missing_memory(step: Step, case: MethodCase, layers: int) -> str | None:
    """That a method in plain operations does not fit into this machine's memory; None if it does, as far as known."""
    path = Path("/proc/meminfo")
    if case.run is this_project or not path.exists():
        return None
    available = next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    # backward of one layer takes three times what the layer keeps; of the loss as much as is kept
    needed = (layers + 3) * _kept_by_layer(step, case) + 2 * _pixels(step)
    if needed <= available * 1024:
        return None
    return f"{step.length:,} tokens: needs about {needed / 2**30:.0f} GiB, {available / 2**20:.0f} GiB are available"


def _kept_by_layer(step: Step, case: MethodCase) -> int:
    """Bytes: the softmax in fp32, what it is rounded to, and of the published method the repeated keys."""
    geometry, size = step.geometry, step.grad_output.element_size()
    rows = geometry.text if case.every_layer else len(step.queries)
    repeated = geometry.head_dim * size if case.every_layer else 0
    return geometry.num_heads * step.length * (rows * (4 + size) + repeated)


def _pixels(step: Step) -> int:
    """Bytes of the upsampled predictions and the masks in fp32."""
    return math.prod(step.geometry.mask_size) * 4 * (len(step.targets) + len(step.masks))


class Run:
    """Runs of one method on one step; each leaves its clock."""

    def __init__(self, step: Step, case: MethodCase, num_layers: int):
        self.step, self.case, self.num_layers = step, case, num_layers
        self.on_layer: Callable[[], None] = lambda: None
        self.between: Callable[[], None] = lambda: None
        self.clock: list[float] = []

    def set_up(self) -> tuple[tuple[Step], dict]:
        """What is not timed: new queries and targets, for which nothing is remembered; the argument of a call."""
        gc.collect()
        return (self.step.fresh(),), {}

    def __call__(self, step: Step) -> None:
        self.clock = [time.perf_counter()]
        run_step(step, self.case.run, self.num_layers, done=self._done, between=self.between)

    def _done(self) -> None:
        self.clock.append(time.perf_counter())
        self.on_layer()

    def given(self) -> list[torch.Tensor]:
        """What is there before a run."""
        return self.step.given()

    def layer_seconds(self) -> float:
        """Of the forward of one layer, in the latest run."""
        return statistics.median(b - a for a, b in zip(self.clock, self.clock[1:], strict=False))


class LossRun(Run):
    """Runs of the mask loss by itself, forward and backward, on maps that are there."""

    def __init__(self, step: Step, loss: Callable[[list[torch.Tensor], Step], torch.Tensor]):
        layers = step.geometry.supervised
        super().__init__(step, MethodCase(lambda *_: None), layers)
        generator = torch.Generator().manual_seed(0)
        shape = len(step.queries), step.queries.key_sets.shape[1]
        self.loss, self.maps = loss, [torch.randn(shape, generator=generator).softmax(-1) for _ in range(layers)]

    def __call__(self, step: Step) -> None:
        maps = [layer.detach().requires_grad_() for layer in self.maps]
        loss = self.loss(maps, step)
        self.between()
        loss.backward()

    def given(self) -> list[torch.Tensor]:
        return [*super().given(), *self.maps]


@dataclass
class Memory:
    """Bytes of one run, above what was there before."""

    peak: int = 0
    kept: int = 0
    saved: int = 0
    kept_by_layer: int = 0
    saved_by_layer: int = 0
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()


@contextmanager
def measure_memory(run: Run):
    """Counts the run that is made in the block; the `Memory` is filled in at its end."""
    memory, saved_after = Memory(), []
    with count_allocations() as counted, watch_saved(run.given()) as saved:

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


def make_record(name: str, run: Run, rounds: int, seconds: float, memory: Memory) -> Record:
    """Of a run that took `seconds`, with the layers added that were not measured."""
    layers = run.case.num_layers(run.step.geometry)
    missing = layers - run.num_layers
    return Record(
        length=run.step.length,
        rows=len(run.step.queries),
        method=name,
        layers=layers,
        layers_measured=run.num_layers,
        rounds=rounds,
        seconds=seconds + missing * run.layer_seconds() if missing else seconds,
        measured_seconds=seconds,
        peak_bytes=memory.peak + missing * memory.kept_by_layer,
        measured_peak_bytes=memory.peak,
        kept_bytes=memory.kept + missing * memory.kept_by_layer,
        saved_bytes=memory.saved + missing * memory.saved_by_layer,
        largest_saved=_shape(memory.shapes[0]) if memory.shapes else "",
        full_size_saved=full_size(memory.shapes, run.step),
        **conditions(run.step),
    )


def attention_record(step: Step, seconds: float) -> Record:
    """Of the flash attention of one layer."""
    measured = {"seconds": seconds, "measured_seconds": seconds, "rounds": 1, "layers": 1, "layers_measured": 1}
    return Record(length=step.length, rows=0, method=ATTENTION, **measured, **conditions(step))


def full_size(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], step: Step) -> str:
    """The largest of the floating-point tensors that are as large as all rows' probabilities or as a layer's query; ""
    if there is none."""
    geometry = step.geometry
    probabilities = geometry.num_heads * step.queries.key_sets.shape[1] * len(step.queries)
    least = min(probabilities, geometry.num_heads * step.length * geometry.head_dim)
    found = [(shape, dtype) for shape, dtype in shapes if dtype.is_floating_point and math.prod(shape) >= least]
    return _shape(max(found, key=lambda saved: math.prod(saved[0]))) if found else ""


def _shape(saved: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = saved
    return f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
