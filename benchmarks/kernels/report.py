"""Report on the Triton kernels, drawn from the CSV files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.core import markdown_table
from benchmarks.kernels import noun_attention_bytes as counted
from benchmarks.kernels.configurations import ARCHITECTURES, all_configurations
from benchmarks.kernels.fixed_builds import LAYERS
from benchmarks.kernels.records import BuildRecord, FixedRecord, TrafficRecord, open_builds, open_fixed, open_traffic

HERE = Path(__file__).parent
REPORT = "kernel_report.md"
NAMES = [f"sm_{architecture}" for architecture in ARCHITECTURES]
READOUTS = {"each": ", each head", "mass": ", masses"}
PARTIALS = ("maxima", "sums", "deltas", "weights", "partials", "grad_query_partials")  # arguments that hold split sums

_INTRODUCTION = """# Kernel report

Written by `make kernel-report`. Nothing here was measured on a GPU: builds are made ahead of time, bytes are counted in
the interpreter.
"""

_BUILDS = """## Builds

By the oldest supported triton (`PYTHONPATH=kernels .venv-oldest/bin/python -m benchmarks.kernels --no-bytes`) and a
newer one, each of which brings its own ptxas. Bounds: shared memory 163 kB on sm_80, 227 kB on sm_90 and sm_100; no
spills on sm_90 up to head_dim 128 and blocks of 8 rows (fp32 excepted); mma on sm_80, wgmma on sm_90,
tcgen05 on sm_100 (not for fp32, which is multiplied in IEEE precision); K loaded 16 bytes at a time. One by one in
`kernel_builds.csv`, those with a tile that is always the same in `fixed_builds.csv`. *Over sets*: the softmax is over
the rows' key sets."""

_VERSION = """
### triton {version}

{builds} of the {total} configurations of the table, each built for its architecture; {objections} of them are objected
to. head_dim 128, bf16, groups of 8 heads: registers a thread, shared memory, tensor-core instructions of the code.
"""

_FIXED = """
Kernels that always run with the same tile (of grid_prediction with {layers} layers): registers a thread, bytes of
shared memory. None may spill.
"""

_BYTES = """
## Bytes

One layer, {heads} query and {key_heads} key heads, head_dim {head_dim}, bf16, as multiples of the floor: every needed
key read once, the maps (in backward their gradient) once, in backward ∂k written once, and read where it is added.
*Issued* counts every load and store, *unique* every address once per launch: a second read of an address costs nothing
where a cache still has it. Argument by argument in `noun_attention_bytes.csv`. *Patches*: a row for each noun token and
each of {patches} temporal patches, its softmax over the patch; the keys of the floor are those of the patches.
"""

_AFTER_BYTES = """
*Added*: in the attention's own node, to the attention's ∂q and ∂k. The fill is that of ∂q with zeros: a token that is
no row has the gradient 0, and a node of its own has to return the whole tensor. It is not in the other figures."""


def draw(folder: Path) -> None:
    """Write the report from the CSV files."""
    files = (open_builds(folder), open_fixed(folder), open_traffic(folder))
    (folder / REPORT).write_text(draw_text(*(file.records.values() for file in files)), encoding="utf-8")


def draw_text(builds: Iterable[BuildRecord], fixed: Iterable[FixedRecord], traffic: Iterable[TrafficRecord]) -> str:
    by_version: dict[str, tuple[list[BuildRecord], list[FixedRecord]]] = defaultdict(lambda: ([], []))
    for record in builds:
        by_version[record.triton][0].append(record)
    for record in fixed:
        by_version[record.triton][1].append(record)
    lines = [_INTRODUCTION, _BUILDS]
    for version, (chosen, same) in sorted(by_version.items()):
        lines += [*_draw_builds(version, chosen), *_draw_fixed(same)]
    return "\n".join([*lines, *_draw_traffic(traffic), ""])


def _draw_builds(version: str, records: list[BuildRecord]) -> list[str]:
    objections = [record for record in records if record.complaints]
    counts = {"builds": len(records), "total": len(list(all_configurations())), "objections": len(objections)}
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    groups: dict[tuple[str, int], list[BuildRecord]] = defaultdict(list)
    for record in records:
        groups[record.dtype, record.head_dim].append(record)
        if (record.head_dim, record.dtype, record.block_heads) == (128, "bf16", 8):
            kernel = record.kernel + ", adding" * bool(record.add) + ", over sets" * bool(record.over_set)
            kernel += READOUTS.get(record.readout, "")
            cells[kernel, _tile(record)][record.arch] = _cell(record)
    rows = [(*name, *(by_arch.get(arch) for arch in NAMES)) for name, by_arch in cells.items()]
    lines = [_VERSION.format(version=version, **counts)]
    lines += markdown_table(("kernel", "rows × heads × keys, warps, stages", *NAMES), "lllll", rows)
    lines += ["", "The largest figures, by dtype and head_dim:", ""]
    header = ("dtype", "head_dim", "builds", "registers", "shared kB", "builds with STL", "STL", "objections")
    lines += markdown_table(header, "lrrrrrrr", [(*name, *_largest(group)) for name, group in groups.items()])
    if objections:
        kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for record in objections:
            kinds[record.kernel, record.arch, record.dtype, str(record.head_dim)].append(record.complaints)
        lines += ["", "Objections:", ""]
        lines += [f"- {' '.join(kind)}: {len(found)} × such as {found[0]}" for kind, found in kinds.items()]
    return lines


def _tile(record: BuildRecord) -> str:
    size = f"{record.block_rows} × {record.block_heads} × {record.block_keys}"
    return f"{size}, {record.warps}, {record.stages}"


def _cell(record: BuildRecord) -> str:
    cell = "–"
    if record.shared is not None:
        cell = f"{record.registers}, {record.shared / 1024:.0f} kB, {record.tensor_cores}"
    if record.spill_stores:
        cell += f", {record.spill_stores} STL"
    return cell + (f" **{record.complaints}**" if record.complaints else "")


def _largest(group: list[BuildRecord]) -> tuple[object, ...]:
    built = [record for record in group if record.registers is not None]
    registers, shared, stores = (
        max((getattr(record, name) for record in built), default=0) for name in ("registers", "shared", "spill_stores")
    )
    spilling = sum(bool(record.spill_stores) for record in built)
    return len(group), registers, f"{shared / 1024:.0f}", spilling, stores, sum(bool(r.complaints) for r in group)


def _draw_fixed(records: list[FixedRecord]) -> list[str]:
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for record in records:
        complaints = f" **{record.complaints}**" if record.complaints else ""
        cells[record.op, record.build][record.arch] = f"{record.registers}, {record.shared}{complaints}"
    rows = [(*name, *(by_arch.get(arch) for arch in NAMES)) for name, by_arch in cells.items()]
    return [_FIXED.format(layers=LAYERS), *markdown_table(("op", "kernel and switches", *NAMES), "lllll", rows)]


def _draw_traffic(records: Iterable[TrafficRecord]) -> list[str]:
    phases: dict[tuple[int, int, str, str], list[TrafficRecord]] = defaultdict(list)
    for record in records:
        phases[record.rows, record.length, record.softmax, record.phase].append(record)
    rows = []
    for (num_rows, length, softmax, phase), group in phases.items():
        kernels = [record for record in group if not record.kernel.startswith("torch.")]
        fills = [record for record in group if record.kernel.startswith("torch.")]
        reads = sum(record.unique for record in kernels if record.tensor == "key") / counted.key_bytes(length)
        shares = [
            f"{sum(values) / group[0].floor:.3f}"
            for values in (
                [record.issued for record in kernels],
                [record.unique for record in kernels],
                [record.unique for record in kernels if record.tensor in PARTIALS],
                [record.unique for record in fills],
            )
        ]
        launches = len({record.launch for record in kernels})
        rows.append((num_rows, f"{length:,}", softmax, phase, launches, *shares[:2], f"{reads:.2f} ×", *shares[2:]))
    header = "rows,keys,softmax,,launches,issued,unique,K read (unique),partials (unique),fills by torch".split(",")
    sizes = {"heads": counted.NUM_HEADS, "key_heads": counted.NUM_KEY_HEADS, "head_dim": counted.HEAD_DIM}
    text = _BYTES.format(**sizes, patches=counted.PATCHES)
    return [text, *markdown_table(header, "rrllrrrrrr", rows), _AFTER_BYTES]
