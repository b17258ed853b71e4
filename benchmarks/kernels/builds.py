"""Ahead-of-time builds of Triton kernels, on a machine with or without a GPU, and what the machine code says of itself.

`build` compiles one kernel for one architecture with the compiler inside the triton wheel and reads registers, spills,
stack, shared and tensor memory, tensor-core instructions, and the width of every access to global memory by kernel
argument. What it cannot tell is the speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block can have
TENSOR_MEMORY = 512  # columns, sm_100
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}

_TENSOR_CORE_INSTRUCTIONS = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}


@dataclass(frozen=True)
class Build:
    """One kernel, one architecture."""

    arch: int
    registers: int  # a thread
    stack: int  # bytes a thread
    spill_stores: int  # STL instructions
    spill_loads: int  # LDL instructions
    shared: int  # bytes a block
    tensor_memory: int  # columns
    tensor_cores: dict[str, int]  # instructions in the PTX: mma, wgmma, tcgen05
    loads: dict[str, Counter] = field(repr=False)  # argument → bytes at a time → instructions in the PTX
    stores: dict[str, Counter] = field(repr=False)


def build(
    kernel: triton.runtime.JITFunction,
    signature: dict[str, str | tuple[str, ...]],
    constexprs: dict[str | tuple[str, int], object],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    aligned: frozenset[str | tuple[str, int]] = frozenset(),
) -> Build:
    """Compile for sm_`arch`.

    Args:
        signature: type of every argument that is no constexpr ("*bf16", "i32", "fp32" …), a tuple of them for a tuple.
        constexprs: value of every one that is; that of a tuple's element under (name, index).
        aligned: arguments and elements that are multiples of 16 (addresses, strides), as a launch finds out by itself.
    """
    source = make_source(kernel, signature, constexprs, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    ptx = compiled.asm["ptx"]
    registers, stack, code = _disassemble(compiled.asm["cubin"])
    kinds = {name: (kind,) if isinstance(kind, str) else kind for name, kind in source.signature.items()}
    parameters = [(name, kind[0] == "*") for name in kinds for kind in kinds[name] if kind != "constexpr"]
    loads, stores = global_accesses(ptx, parameters)
    return Build(
        arch=arch,
        registers=registers,
        stack=stack,
        spill_stores=len(re.findall(r"\bSTL\b", code)),
        spill_loads=len(re.findall(r"\bLDL\b", code)),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        tensor_cores={
            kind: len(re.findall(rf"(?<![.\w]){re.escape(text)}", ptx))
            for kind, text in _TENSOR_CORE_INSTRUCTIONS.items()
        },
        loads=loads,
        stores=stores,
    )


def make_source(
    kernel: triton.runtime.JITFunction,
    signature: dict[str, str | tuple[str, ...]],
    constexprs: dict[str | tuple[str, int], object],
    aligned: frozenset[str | tuple[str, int]] = frozenset(),
) -> ASTSource:
    """Return what Triton compiles. Arguments as for `build`."""
    names = kernel.arg_names
    missing = [name for name in names if name not in signature and name not in constexprs]
    if missing:
        raise ValueError(f"{kernel.__name__}: neither type nor value for {', '.join(missing)}")

    def path(key: str | tuple[str, int]) -> tuple[int, ...]:
        return (names.index(key),) if isinstance(key, str) else (names.index(key[0]), key[1])

    return ASTSource(
        kernel,
        {name: "constexpr" if name in constexprs else signature[name] for name in names},
        {path(key): value for key, value in constexprs.items()},
        {path(key): [["tt.divisibility", 16]] for key in aligned if key not in constexprs},
    )


def aligned_pointers(
    kernel: triton.runtime.JITFunction, signature: dict[str, str | tuple[str, ...]]
) -> frozenset[str | tuple[str, int]]:
    """Return the pointers, also in tuples, that a launch with whole tensors finds to be multiples of 16."""
    left_out = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}  # has no effect on tuples
    pointers = {name for name, kind in signature.items() if isinstance(kind, str) and kind[0] == "*"} - left_out
    tuples = [(name, i) for name, kind in signature.items() if isinstance(kind, tuple) for i in range(len(kind))]
    return frozenset([*pointers, *(key for key in tuples if signature[key[0]][key[1]][0] == "*")])


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Return registers and stack of the kernel, and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(usage[1]), int(usage[2]), text


def global_accesses(ptx: str, parameters: list[tuple[str, bool]]) -> tuple[dict[str, Counter], dict[str, Counter]]:
    """Count the loads and stores of global memory in a kernel's PTX by argument and width in bytes.

    An address is followed back to the pointer from which it was computed. Bulk copies (TMA) count as 128 bytes.

    Args:
        parameters: names in order, True for pointers.
    """
    origin: dict[str, set[str]] = {}  # register → pointers that flow into it
    flows = []
    for line in ptx.splitlines():
        instruction = re.sub(r"^\s*(@!?%\w+\s+)?", "", line)
        if match := re.match(r"ld\.param\.\w+\s+(%\w+), \[\w+?_param_(\d+)", instruction):
            name, is_pointer = parameters[int(match[2])] if int(match[2]) < len(parameters) else ("scratch", True)
            if is_pointer:
                origin[match[1]] = {name}
        elif match := re.match(r"(add|sub|mov|mad|selp|cvta|shl|or|and)\.[\w.]*\s+(%\w+), (.*);", instruction):
            flows.append((match[2], re.findall(r"%\w+", match[3])))
    changed = True
    while changed:
        changed = False
        for target, sources in flows:
            found = set().union(*(origin.get(source, ()) for source in sources)) - origin.get(target, set())
            if found:
                origin.setdefault(target, set()).update(found)
                changed = True

    loads: dict[str, Counter] = {}
    stores: dict[str, Counter] = {}
    for line in ptx.splitlines():
        if match := re.search(r"\b(ld|st)\.global([\w.:]*)\s.*?\[\s*(%\w+)", line):
            kind, modifiers, address = match.groups()
            vector = re.search(r"\.v(\d)", modifiers)
            width = int(re.search(r"\.[bsuf](\d+)$", modifiers)[1]) // 8 * (int(vector[1]) if vector else 1)
        elif match := re.search(r"\bcp\.async\.c[ag][\w.:]*\s+\[[^\]]*\], \[\s*(%\w+)[^\]]*\], (\w+)", line):
            kind, address, width = "ld", match[1], int(match[2], 0)
        elif match := re.search(
            r"\bcp\.async\.bulk\.tensor\.[\w.]*shared[\w:]*\.global[\w.:]*\s+\[[^\]]*\], \[\s*(%\w+)", line
        ):
            kind, address, width = "ld", match[1], 128
        else:
            continue
        pointers = origin.get(address, {"?"})
        table = loads if kind == "ld" else stores
        for name in pointers:
            table.setdefault(name, Counter())[width] += 1
    return loads, stores
