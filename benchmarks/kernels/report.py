"""What is known of the Triton kernels without a GPU: `make kernel-report`.

Builds every configuration of `configurations.py` and the kernels of `fixed_builds.py` ahead of
time, counts bytes in the interpreter (`noun_attention_bytes.py`), and writes kernel_builds.csv, fixed_builds.csv,
noun_attention_bytes.csv and kernel_report.md beside this file. No figure here is a measurement on a GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import multiprocessing
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.errors import TritonError

from benchmarks.kernels import noun_attention_bytes
from benchmarks.kernels.builds import SHARED_MEMORY, TENSOR_CORES, TENSOR_MEMORY, Build, build
from benchmarks.kernels.configurations import (
    ARCHITECTURES,
    BLOCK_HEADS,
    DTYPES,
    HEAD_DIMS,
    Configuration,
    all_configurations,
)
from benchmarks.kernels.fixed_builds import LAYERS, fixed_builds

HERE = Path(__file__).parent
BUILDS, FIXED, REPORT = HERE / "kernel_builds.csv", HERE / "fixed_builds.csv", HERE / "kernel_report.md"
FIXED_FIELDS = ["op", "build", "arch", "registers", "shared", "complaints"]
FIELDS = ["kernel", "arch", "dtype", "head_dim", "add", "block_rows", "block_heads", "block_keys", "warps", "stages"]
FIELDS += ["registers", "stack", "spill_stores", "spill_loads", "shared", "tensor_memory", "tensor_cores"]
FIELDS += ["key_load_bytes", "complaints"]
PARTIALS = ("maxima", "sums", "deltas", "weights", "partials", "grad_query_partials")  # arguments that hold split sums


@dataclass(frozen=True)
class Result:
    """A configuration and what its build says, or why there is none."""

    configuration: Configuration
    build: Build | None
    error: str = ""

    def complaints(self) -> list[str]:
        """Why this configuration should not be chosen; empty if all is well."""
        configuration, build = self.configuration, self.build
        if build is None:
            return [self.error]
        found = []
        if build.shared > SHARED_MEMORY[build.arch]:
            found.append(f"shared memory {build.shared} of {SHARED_MEMORY[build.arch]} bytes")
        if build.tensor_memory > TENSOR_MEMORY:
            found.append(f"tensor memory {build.tensor_memory} of {TENSOR_MEMORY} columns")
        tile = configuration.tile
        small = configuration.head_dim <= 128 and tile.block_rows <= 8
        small = small and not (configuration.dtype == "fp32" and tile.block_heads == 16)  # ∂k there: up to 91 registers
        if build.spill_stores + build.spill_loads and small and build.arch == 90:
            found.append(f"spills: {build.spill_stores} STL, {build.spill_loads} LDL, {build.stack} bytes of stack")
        if "key" in configuration.signature():
            if configuration.dtype != "fp32" and not build.tensor_cores[TENSOR_CORES[build.arch]]:
                found.append(f"no {TENSOR_CORES[build.arch]}")
            if set(build.loads.get("key", ())) != {16}:
                found.append(f"keys loaded {sorted(build.loads.get('key', ()))} bytes at a time")
        return found

    def row(self) -> dict[str, object]:
        configuration, build, tile = self.configuration, self.build, self.configuration.tile
        chosen = {
            "kernel": configuration.kernel,
            "arch": f"sm_{configuration.architecture}",
            "dtype": configuration.dtype,
            "head_dim": configuration.head_dim,
            "add": "yes" if configuration.add else "",
            "block_rows": tile.block_rows,
            "block_heads": tile.block_heads,
            "block_keys": tile.block_keys,
            "warps": tile.num_warps,
            "stages": tile.num_stages,
        }
        said = (
            {}
            if build is None
            else {
                "registers": build.registers,
                "stack": build.stack,
                "spill_stores": build.spill_stores,
                "spill_loads": build.spill_loads,
                "shared": build.shared,
                "tensor_memory": build.tensor_memory,
                "tensor_cores": " ".join(f"{kind} {count}" for kind, count in build.tensor_cores.items() if count),
                "key_load_bytes": " ".join(str(width) for width in sorted(build.loads.get("key", ()))),
            }
        )
        return chosen | said | {"complaints": "; ".join(self.complaints())}


def build_one(configuration: Configuration) -> Result:
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
    """Results in the order of the configurations, from several processes."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from pool.map(build_one, configurations)


def draw(builds: list[dict[str, str]], fixed: list[dict[str, str]], traffic: list[dict[str, str]]) -> str:
    """The report, from what the CSV files say."""
    return "\n".join([_INTRODUCTION, *_draw_builds(builds), *_draw_fixed(fixed), *_draw_traffic(traffic), ""])


_INTRODUCTION = """# Kernel report

Written by `make kernel-report`. Nothing here was measured on a GPU: builds are made ahead of time, bytes are counted in
the interpreter.
"""

_BUILDS = """## Builds

triton {version}. {builds} of the {total} configurations of the table, each built for its architecture;
{objections} of them are objected to. One by one in `kernel_builds.csv`. Bounds: shared memory 163 kB on sm_80, 227 kB
on sm_90 and sm_100; no spills on sm_90 up to head_dim 128 and blocks of 8 rows (fp32 with groups of 16 excepted);
mma on sm_80, wgmma on sm_90, tcgen05 on sm_100 (not for fp32, which is multiplied in IEEE precision); K loaded
16 bytes at a time.

head_dim 128, bf16, groups of 8 heads: registers a thread, shared memory, tensor-core instructions of the code.

| kernel | rows × heads × keys, warps, stages | sm_80 | sm_90 | sm_100 |
|---|---|---|---|---|"""

_BYTES = """
## Bytes

One layer, {heads} query and {key_heads} key heads, head_dim {head_dim}, bf16, as multiples of the floor: every needed
key read once, the maps (in backward their gradient) once, in backward ∂k written once, and read where it is added.
*Issued* counts every load and store, *unique* every address once per launch: a second read of an address costs nothing
where a cache still has it. Argument by argument in `noun_attention_bytes.csv`.

| rows | keys | | launches | issued | unique | K read, unique | partials, unique | fills by torch |
|---|---|---|---|---|---|---|---|---|"""

_AFTER_BYTES = """
*Added*: in the attention's own node, to the attention's ∂q and ∂k. The fill is that of ∂q with zeros: a token that is
no row has the gradient 0, and a node of its own has to return the whole tensor. It is not in the other figures."""


def _draw_builds(rows: list[dict[str, str]]) -> list[str]:
    objections = [row for row in rows if row["complaints"]]
    total = len(list(all_configurations()))
    counts = {"builds": len(rows), "total": total, "objections": len(objections)}
    lines = [_BUILDS.format(version=triton.__version__, **counts)]
    table: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        if (row["head_dim"], row["dtype"], row["block_heads"]) == ("128", "bf16", "8"):
            tile = f"{row['block_rows']} × {row['block_heads']} × {row['block_keys']}, {row['warps']}, {row['stages']}"
            shared = f"{int(row['shared']) / 1024:.0f} kB" if row["shared"] else ""
            cell = f"{row['registers']}, {shared}, {row['tensor_cores']}" if shared else "–"
            cell += f", {row['spill_stores']} STL" if row["spill_stores"] not in ("", "0") else ""
            kernel = row["kernel"] + (", adding" if row["add"] else "")
            table[kernel, tile][row["arch"]] = cell + (f" **{row['complaints']}**" if row["complaints"] else "")
    for (kernel, tile), cells in table.items():
        lines.append(
            f"| {kernel} | {tile} | " + " | ".join(cells.get(f"sm_{arch}", "") for arch in (80, 90, 100)) + " |"
        )
    lines += ["", "The largest figures, by dtype and head_dim:", ""]
    lines += ["| dtype | head_dim | builds | registers | shared kB | builds with STL | STL | objections |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["dtype"], row["head_dim"]].append(row)
    for (dtype, head_dim), group in groups.items():
        built = [row for row in group if row["registers"]]
        worst = [max((int(row[name]) for row in built), default=0) for name in ("registers", "shared", "spill_stores")]
        spilling = sum(int(row["spill_stores"]) > 0 for row in built)
        count = sum(bool(row["complaints"]) for row in group)
        figures = [dtype, head_dim, len(group), worst[0], f"{worst[1] / 1024:.0f}", spilling, worst[2], count]
        lines.append(f"| {' | '.join(map(str, figures))} |")
    if objections:
        lines += ["", "Objections:", ""]
        kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for row in objections:
            kinds[row["kernel"], row["arch"], row["dtype"], row["head_dim"]].append(row["complaints"])
        lines += [f"- {' '.join(kind)}: {len(found)} × such as {found[0]}" for kind, found in kinds.items()]
    return lines


_FIXED = """
Kernels that always run with the same tile (of grid_prediction with {layers} layers): registers a thread, bytes of
shared memory. None may spill.

| op | kernel and switches | sm_80 | sm_90 | sm_100 |
|---|---|---|---|---|"""


def _draw_fixed(rows: list[dict[str, str]]) -> list[str]:
    table: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        cell = f"{row['registers']}, {row['shared']}" + (f" **{row['complaints']}**" if row["complaints"] else "")
        table[row["op"], row["build"]][row["arch"]] = cell
    lines = [_FIXED.format(layers=LAYERS)]
    for (op, name), cells in table.items():
        lines.append(f"| {op} | {name} | " + " | ".join(cells[f"sm_{arch}"] for arch in (80, 90, 100)) + " |")
    return lines


def _draw_traffic(rows: list[dict[str, str]]) -> list[str]:
    shape = noun_attention_bytes
    lines = [_BYTES.format(heads=shape.NUM_HEADS, key_heads=shape.NUM_KEY_HEADS, head_dim=shape.HEAD_DIM)]
    phases: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        phases[row["rows"], row["length"], row["phase"]].append(row)
    for (num_rows, length, phase), group in phases.items():
        floor = int(group[0]["floor"])
        kernels = [row for row in group if not row["kernel"].startswith("torch.")]

        def part(chosen, column="unique", floor=floor):
            return f"{sum(int(row[column]) for row in chosen) / floor:.3f}"

        a_key = int(length) * shape.NUM_KEY_HEADS * shape.HEAD_DIM * shape.BYTES
        reads = sum(int(row["unique"]) for row in kernels if row["tensor"] == "key") / a_key
        partials = [row for row in kernels if row["tensor"] in PARTIALS]
        fills = part([row for row in group if row["kernel"].startswith("torch.")])
        launches = len({row["launch"] for row in kernels})
        lines.append(
            f"| {num_rows} | {int(length):,} | {phase} | {launches} | {part(kernels, 'issued')} | {part(kernels)} "
            f"| {reads:.2f} × | {part(partials)} | {fills} |"
        )
    lines.append(_AFTER_BYTES)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--block-heads", type=int, nargs="*", default=BLOCK_HEADS, help="only groups of so many heads")
    parser.add_argument("--dtypes", nargs="*", default=DTYPES, choices=DTYPES)
    parser.add_argument("--head-dims", type=int, nargs="*", default=HEAD_DIMS)
    parser.add_argument("--no-bytes", action="store_true", help="keep the counts that are there")
    parser.add_argument("--draw", action="store_true", help="only draw the report again from the CSV files")
    arguments = parser.parse_args()
    if not arguments.draw and not arguments.no_bytes:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-m", "benchmarks.kernels.noun_attention_bytes"], env=environment, check=True)
    if not arguments.draw:
        chosen = all_configurations(
            dtypes=arguments.dtypes, head_dims=arguments.head_dims, block_heads=arguments.block_heads
        )
        write_builds(list(chosen), arguments.workers)
        write_fixed()
    tables = []
    for path in (BUILDS, FIXED, noun_attention_bytes.CSV):
        with path.open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    REPORT.write_text(draw(*tables))


def write_fixed() -> None:
    with FIXED.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIXED_FIELDS, lineterminator="\n")
        writer.writeheader()
        for fixed in fixed_builds():
            for architecture in ARCHITECTURES:
                built = fixed.build(architecture)
                values = (fixed.op, fixed.name, f"sm_{architecture}", built.registers, built.shared)
                writer.writerow(dict(zip(FIXED_FIELDS, (*values, "; ".join(fixed.complaints(built))), strict=True)))


def write_builds(configurations: Sequence[Configuration], workers: int) -> None:
    with BUILDS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for number, result in enumerate(build_all(configurations, workers), start=1):
            writer.writerow(result.row())
            file.flush()
            print(f"\r{number} of {len(configurations)} builds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
