"""Builds of every configuration, and the rows of the three CSV files."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.errors import TritonError

from benchmarks.core import RecordFile
from benchmarks.kernels.builds import SHARED_MEMORY, TENSOR_CORES, TENSOR_MEMORY, Build, build
from benchmarks.kernels.configurations import ARCHITECTURES, Configuration
from benchmarks.kernels.fixed_builds import FixedBuild
from swim_kernels.attention_rows.triton.tiles import READOUTS


@dataclass(frozen=True)
class BuildRecord:
    """A configuration and what its build by one version of triton says; figures are None where there is no build."""

    triton: str
    kernel: str
    arch: str
    dtype: str
    head_dim: int
    add: str  # "yes": ∂k is added to what is there
    over_set: str  # "yes": the softmax is over key sets
    readout: str  # "mean", "each", "mass": what the weights of a gradient are of; "" where it makes no difference
    block_rows: int
    block_heads: int
    block_keys: int
    warps: int
    stages: int
    registers: int | None = None
    stack: int | None = None
    spill_stores: int | None = None
    spill_loads: int | None = None
    shared: int | None = None
    tensor_memory: int | None = None
    tensor_cores: str = ""
    key_load_bytes: str = ""
    complaints: str = ""


@dataclass(frozen=True)
class FixedRecord:
    """A kernel that always runs with the same tile, built by one version of triton for one architecture."""

    triton: str
    op: str
    build: str
    arch: str
    registers: int
    shared: int
    complaints: str


@dataclass(frozen=True)
class TrafficRecord:
    """Bytes that one argument of one launch moves."""

    rows: int
    length: int
    softmax: str
    phase: str
    launch: int
    kernel: str
    tensor: str
    access: str
    issued: int
    unique: int
    floor: int  # least bytes of the phase


def open_builds(folder: Path) -> RecordFile[BuildRecord]:
    tile = ("block_rows", "block_heads", "block_keys")
    key = ("triton", "kernel", "arch", "dtype", "head_dim", "add", "over_set", "readout", *tile)
    return RecordFile(folder / "kernel_builds.csv", BuildRecord, *key)


def open_fixed(folder: Path) -> RecordFile[FixedRecord]:
    return RecordFile(folder / "fixed_builds.csv", FixedRecord, "triton", "op", "build", "arch")


def open_traffic(folder: Path) -> RecordFile[TrafficRecord]:
    key = ("rows", "length", "softmax", "phase", "launch", "kernel", "tensor", "access")
    return RecordFile(folder / "noun_attention_bytes.csv", TrafficRecord, *key)


@dataclass(frozen=True)
class Result:
    """A configuration and its build, or why there is none."""

    configuration: Configuration
    build: Build | None
    error: str = ""

    def complaints(self) -> list[str]:
        """Return why this configuration should not be chosen; nothing if all is well."""
        configuration, build = self.configuration, self.build
        if build is None:
            return [self.error]
        found = []
        if build.shared > SHARED_MEMORY[build.arch]:
            found.append(f"shared memory {build.shared} of {SHARED_MEMORY[build.arch]} bytes")
        if build.tensor_memory > TENSOR_MEMORY:
            found.append(f"tensor memory {build.tensor_memory} of {TENSOR_MEMORY} columns")
        tile = configuration.tile
        # fp32, which trains nothing on a GPU, holds its operands in registers and spills some of them
        small = configuration.head_dim <= 128 and tile.block_rows <= 8 and configuration.dtype != "fp32"
        if build.spill_stores + build.spill_loads and small and build.arch == 90:
            found.append(f"spills: {build.spill_stores} STL, {build.spill_loads} LDL, {build.stack} bytes of stack")
        if "key" in configuration.signature():
            if configuration.dtype != "fp32" and not build.tensor_cores[TENSOR_CORES[build.arch]]:
                found.append(f"no {TENSOR_CORES[build.arch]}")
            if set(build.loads.get("key", ())) != {16}:
                found.append(f"keys loaded {sorted(build.loads.get('key', ()))} bytes at a time")
        return found

    def record(self) -> BuildRecord:
        configuration, build, tile = self.configuration, self.build, self.configuration.tile
        said: dict[str, object] = {}
        if build is not None:
            names = ("registers", "stack", "spill_stores", "spill_loads", "shared", "tensor_memory")
            said = {name: getattr(build, name) for name in names}
            said["tensor_cores"] = " ".join(f"{kind} {count}" for kind, count in build.tensor_cores.items() if count)
            said["key_load_bytes"] = " ".join(str(width) for width in sorted(build.loads.get("key", ())))
        return BuildRecord(
            triton=triton.__version__,
            kernel=configuration.kernel,
            arch=f"sm_{configuration.architecture}",
            dtype=configuration.dtype,
            head_dim=configuration.head_dim,
            add="yes" * configuration.add,
            over_set="yes" * configuration.over_set,
            readout=configuration.readout if configuration.kernel in READOUTS else "",
            block_rows=tile.block_rows,
            block_heads=tile.block_heads,
            block_keys=tile.block_keys,
            warps=tile.num_warps,
            stages=tile.num_stages,
            complaints="; ".join(self.complaints()),
            **said,
        )


def build_one(configuration: Configuration) -> Result:
    """Build a configuration; one that does not compile is a result too."""
    tile = configuration.tile
    try:
        built = build(
            configuration.function(),
            configuration.signature(),
            configuration.constexprs(),
            arch=configuration.architecture,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            aligned=configuration.aligned(),
        )
    except (TritonError, RuntimeError) as error:  # of the front end, of the passes or of ptxas
        return Result(configuration, None, f"does not compile: {str(error).strip().splitlines()[-1]}")
    return Result(configuration, built)


def build_all(configurations: Sequence[Configuration], workers: int) -> Iterator[Result]:
    """Yield results in the order of the configurations, built by several processes."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from pool.map(build_one, configurations)


def build_fixed(fixed: FixedBuild) -> list[FixedRecord]:
    """Build a kernel with its only tile for every architecture."""
    found = []
    for architecture in ARCHITECTURES:
        built = fixed.build(architecture)
        figures = (built.registers, built.shared, "; ".join(fixed.complaints(built)))
        found.append(FixedRecord(triton.__version__, fixed.op, fixed.name, f"sm_{architecture}", *figures))
    return found
