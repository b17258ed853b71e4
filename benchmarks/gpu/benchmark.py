"""Times on the GPU, in `gpu_benchmark.csv`: kernels against byte floors, other methods, the loss, a model's step.

Medians between CUDA events; before every run a buffer larger than the L2 cache is written. A floor is the time to move
the needed bytes once at the bandwidth that a large copy reaches here. Methods run beside a flash attention that is
replayed, which costs them nothing; it is timed by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton

from benchmarks.attention_loss.inputs import Geometry, Replayed, Step, make_step
from benchmarks.attention_loss.measure import count_layers
from benchmarks.attention_loss.methods import CAUSAL, METHODS, OURS, Forward, Method, _Attention, run_step
from benchmarks.core import RecordFile, read_cpu_model
from benchmarks.gpu.checks import FAIL, MISS, PASS, SKIP, CheckLog, Options, describe_error
from benchmarks.gpu.layers import TINY, floor_bytes, record_launches
from swim_fast.loss.mask_loss import GridPredictions, mask_alignment_loss
from swim_fast.loss.metrics import sum_metrics
from swim_kernels import noun_attention

CSV = "gpu_benchmark.csv"
REPEATS = 20
SEPARATE, FLASH = "swim_fast, separate nodes", "flash attention"
LEAST_OF_BANDWIDTH, MOST_OF_STEP = 0.7, 0.01  # the targets
FROM_LENGTH = 16384  # of the first


@dataclass(frozen=True)
class Timing:
    """One measured thing; of a method the sum over `layers` layers."""

    section: str
    name: str
    length: int
    rows: int  # noun tokens
    layers: int
    ms: float
    host_ms: float  # until the host is free again
    floor_ms: float | None = None
    of_bandwidth: float | None = None  # floor_ms / ms
    peak_mib: float | None = None  # above what was there before
    processor: str = ""
    torch: str = torch.__version__
    triton: str = triton.__version__


class Clock:
    """Times functions on one device."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
            self._flush = torch.empty(max(2 * cache, 2**27), dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, run: Callable[[], object], seconds: float = 1.0) -> tuple[float, float, float | None]:
        """Return the median ms of the device and of the host, and the peak memory of the first run in MiB.

        At least three runs, then as many of `repeats` as fit into `seconds`.
        """
        peak = self._measure_peak(run)
        begin, of_device, of_host = time.perf_counter(), [], []
        while len(of_device) < self.repeats and (len(of_device) < 3 or time.perf_counter() - begin < seconds):
            device, host = self._time_once(run)
            of_device.append(device)
            of_host.append(host)
        return statistics.median(of_device), statistics.median(of_host), peak

    def _measure_peak(self, run: Callable[[], object]) -> float | None:
        if not self.on_gpu:
            run()
            return None
        run()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def _time_once(self, run: Callable[[], object]) -> tuple[float, float]:
        if not self.on_gpu:
            begin = time.perf_counter()
            run()
            ms = 1000 * (time.perf_counter() - begin)
            return ms, ms
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
        return max(start.elapsed_time(end), 1e-6), 1000 * host  # a pretend GPU takes no time


def forward_separate(step: Step, layers, done) -> Forward:
    """The attention and the maps from nodes of their own."""
    outputs, maps = [], []
    for query, key, value in layers:
        outputs.append(_Attention.apply(query, key, value, step.attention, step.call))
        maps.append(noun_attention(query, key, step.patch_queries))
        done()
    return Forward(outputs, maps, mask_alignment_loss(maps, step.patch_targets))


OURS_ALL = (OURS, CAUSAL, SEPARATE)
ALL_METHODS = METHODS | {SEPARATE: Method(forward_separate)}


class Benchmark:
    """The measurements, each written down at once."""

    def __init__(self, options: Options, log: CheckLog):
        self.options, self.log = options, log
        self.deadline = time.monotonic() + options.seconds - 5
        self.on_gpu = options.device == "cuda"
        self.geometry = Geometry() if self.on_gpu else TINY
        self.lengths, self.rows = (4096, 16384, 65536, 131072), (4, 8, 64)
        if options.quick:
            self.lengths, self.rows = (4096, 16384), (8,)
        if not self.on_gpu:
            self.lengths, self.rows = (128,), (4,)
        self.clock = Clock(options.device, REPEATS if self.on_gpu else 3)
        self.file = RecordFile(options.output / CSV, Timing, "section", "name", "length", "rows")
        self.processor = torch.cuda.get_device_name(0) if self.on_gpu else read_cpu_model()
        self.bandwidth = 0.0  # bytes a ms

    def run(self) -> None:
        if self.on_gpu:
            self.attempt("compilation", self.compile)
        self.attempt("copy bandwidth", self.measure_copy)
        for length in self.lengths:
            self.attempt(f"{length:,} tokens", self.measure_length, length)
        self.attempt("step of a 2-layer model", self.measure_model)

    def attempt(self, name: str, measure: Callable[..., str | None], *arguments) -> None:
        """Measure one thing, unless time is over; what fails is a failed check."""
        begin = time.monotonic()
        if begin > self.deadline:
            self.log.add(name, SKIP, f"no time left of {self.options.seconds:.0f} s")
            return
        try:
            detail = measure(*arguments) or ""
        except torch.cuda.OutOfMemoryError as error:
            self.log.add(name, SKIP, describe_error(error), time.monotonic() - begin)
        except Exception as error:
            import traceback

            traceback.print_exc()
            self.log.add(name, FAIL, describe_error(error), time.monotonic() - begin)
        else:
            self.log.add(name, PASS, detail, time.monotonic() - begin)
        if self.on_gpu:
            torch.cuda.empty_cache()

    def put(
        self, section: str, name: str, length: int, rows: int, layers: int, run, floor: int | None = None
    ) -> Timing:
        """Time a function and write it down; `floor` in bytes."""
        ms, host_ms, peak = self.clock.time(run)
        floor_ms = None if floor is None or not self.bandwidth else floor / self.bandwidth
        of_bandwidth = None if floor_ms is None else round(floor_ms / ms, 3)
        timing = Timing(
            section,
            name,
            length,
            rows,
            layers,
            round(ms, 4),
            round(host_ms, 4),
            None if floor_ms is None else round(floor_ms, 4),
            of_bandwidth,
            None if peak is None else round(peak, 1),
            self.processor,
        )
        self.file.put(timing)
        print(f"{section}: {name}, {length:,} tokens, {rows} rows: {ms:.3f} ms", flush=True)
        return timing

    def compile(self) -> str:
        """Compile what is measured in several processes; tiles do not depend on the length."""
        combinations = [(rows, name) for rows in self.rows for name in (OURS, CAUSAL)]
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(min(len(combinations), len(os.sched_getaffinity(0)))) as pool:
            pool.map_async(compile_one, combinations).get(timeout=90)
        return f"{len(combinations)} variants"

    def measure_copy(self) -> str:
        size = 2**30 if self.on_gpu else 2**22
        source, target = (torch.empty(size, dtype=torch.uint8, device=self.options.device) for _ in range(2))
        timing = self.put("copy", "copy of 1 GiB" if self.on_gpu else "copy", 0, 0, 0, lambda: target.copy_(source))
        self.bandwidth = 2 * size / timing.ms
        return f"{self.bandwidth / 1e6:,.0f} GB/s"

    def measure_length(self, length: int) -> str | None:
        base = make_step(length, 1, self.geometry, device=self.options.device)
        query, key, value = base.layers[0]

        def attend():
            results = tuple(base.attention.forward(query, key, value, base.call))
            base.attention.backward(base.grad_output, query, key, value, results, base.call)

        flash = self.put("method", FLASH, length, 0, 1, attend)
        replayed = Replayed(base.attention)
        replayed.compute(base)
        base = replace(base, attention=replayed)
        for rows in self.rows:
            step = base.with_rows(rows)
            for name in (OURS, CAUSAL):
                self.measure_kernels(step, name)
            self.measure_parts(step)
            self.measure_methods(step, flash)
        return f"flash attention takes {flash.ms:.2f} ms a layer"

    def measure_kernels(self, step: Step, method: str) -> None:
        """Time every launch of one layer's forward and backward by itself."""
        queries = step.patch_queries if method == OURS else step.queries
        with record_launches(interpreted=not self.on_gpu) as launches:
            run_step(step.fresh(), METHODS[method].forward, 1)
        rows = len(step.queries)
        for launch in {launch.name: launch for launch in launches}.values():
            if time.monotonic() > self.deadline:
                return
            name = f"{launch.name}, {'patches' if method == OURS else 'causal'}"
            floor = floor_bytes(launch, queries)
            timing = self.put("kernel", name, step.length, rows, 1, launch.repeat, floor)
            if self.on_gpu and "key" in launch.arguments and step.length >= FROM_LENGTH:
                state = PASS if timing.of_bandwidth >= LEAST_OF_BANDWIDTH else MISS
                what = f"{timing.of_bandwidth:.0%} of the copy bandwidth, wanted {LEAST_OF_BANDWIDTH:.0%}"
                self.log.add(f"{name}, {step.length:,} tokens, {rows} rows", state, what)

    def measure_parts(self, step: Step) -> None:
        """Time the mask loss, the metrics and the plan of the rows."""
        rows, layers = len(step.queries), step.geometry.supervised
        shape = len(step.patch_queries), step.patch_queries.key_sets.shape[1]
        maps = [torch.rand(shape, device=self.options.device, requires_grad=True) for _ in range(layers)]

        def losses():
            torch.autograd.grad(mask_alignment_loss(maps, step.patch_targets), maps)

        def metrics():
            sum_metrics(GridPredictions.from_maps(maps, step.patch_targets))

        def plan():
            from swim_kernels.attention_rows.triton.plan import plan_of

            plan_of(step.fresh().patch_queries, 1, step.length, 8)

        for name, run in (("mask loss", losses), ("metrics", metrics), ("plan of the rows", plan)):
            self.put("batch", name, step.length, rows, layers, run)

    def measure_methods(self, step: Step, flash: Timing) -> None:
        rows = len(step.queries)
        budget = torch.cuda.mem_get_info()[0] // 3 if self.on_gpu else 2**30
        for name, method in ALL_METHODS.items():
            what = f"{name}, {step.length:,} tokens, {rows} rows"
            if time.monotonic() > self.deadline:
                self.log.add(what, SKIP, f"no time left of {self.options.seconds:.0f} s")
                continue
            layers = count_layers(step, method, budget)

            def run(method=method, layers=layers):
                run_step(step.fresh(), method.forward, layers)

            try:
                timing = self.put("method", name, step.length, rows, layers, run)
            except torch.cuda.OutOfMemoryError as error:
                self.log.add(what, SKIP, describe_error(error))
                torch.cuda.empty_cache()
            except (RuntimeError, ValueError) as error:
                if not self.options.ignore_values or name in OURS_ALL:
                    raise
                self.log.add(what, SKIP, f"plain operations need values: {describe_error(error)}")
            else:
                if name in (OURS, SEPARATE):
                    self.log.add(what, PASS, f"{timing.ms / layers / flash.ms:.2%} of flash attention, a layer")

    def measure_model(self) -> str:
        """Time a step of two layers of 7B width, both supervised, and the same without maps."""
        from swim_fast.demo.tiny_model import ModelSize, build_model, train_tokenizer
        from swim_fast.modeling import attach_noun_attention

        device = self.options.device
        sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_heads": 28, "num_key_value_heads": 4}
        size = ModelSize(num_layers=2, initializer_range=0.02, **(sizes if self.on_gpu else {}))
        with torch.device(device):
            model = build_model(train_tokenizer(["a dog and a cat"] * 4, 300), size, seed=0)
        model = attach_noun_attention(model.to(torch.bfloat16 if self.on_gpu else torch.float32), [0, 1])
        length = FROM_LENGTH if self.on_gpu else self.lengths[0]
        step = make_step(length, 8 if self.on_gpu else 4, self.geometry, device=device)
        ids = torch.randint(20, 250, (1, length), device=device)

        def run(with_maps: bool):
            model.zero_grad(set_to_none=True)
            queries = {"noun_queries": replace(step.patch_queries)} if with_maps else {}
            outputs = model(input_ids=ids, logits_to_keep=1, use_cache=False, **queries)
            loss = outputs.logits.float().square().mean()
            if with_maps:
                loss = loss + mask_alignment_loss(list(outputs.attentions), step.patch_targets)
            loss.backward()

        rows = len(step.queries)
        plain = self.put("step", "two layers of 7B width", length, rows, 2, lambda: run(False))
        ours = self.put("step", "two layers of 7B width, both supervised", length, rows, 2, lambda: run(True))
        share = 6 / 28 * (ours.ms - plain.ms) / plain.ms
        if self.on_gpu:
            state = PASS if share <= MOST_OF_STEP else MISS
            what = f"{share:.2%} of a step with 6 supervised layers of 28, wanted at most {MOST_OF_STEP:.0%}"
            self.log.add(f"attention loss in a step of {length:,} tokens", state, what)
        return f"{plain.ms:.1f} ms without maps, {ours.ms:.1f} ms with"


def compile_one(combination: tuple[int, str]) -> None:
    """Run a layer and its loss of a short sequence, which compiles its kernels into Triton's cache."""
    rows, name = combination
    step = make_step(2048, rows, device="cuda")
    run_step(step, METHODS[name].forward, 1)
    torch.cuda.synchronize()


def run(options: Options, log: CheckLog) -> None:
    Benchmark(options, log).run()
