"""Kernels that always run with the same tile: what they are built with ahead of time, for test and report.

Those that add up partials of noun attention and noun mass, and the ops `grid_prediction` and `mask_bce`. The kernels
with a tile of keys have a table of their own (`configurations.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.kernels.builds import SHARED_MEMORY, Build, aligned_pointers, build, make_source
from swim_kernels.attention_rows.triton import kernels as row_kernels
from swim_kernels.grid_prediction.reference import FUSIONS
from swim_kernels.grid_prediction.triton import kernels as frame_kernels
from swim_kernels.grid_prediction.triton import launch as frame_backend
from swim_kernels.mask_bce.triton import kernels as mask_kernels
from swim_kernels.mask_bce.triton import launch as mask_backend
from swim_kernels.noun_attention.triton import kernels as map_kernels
from swim_kernels.noun_mass.triton import kernels as mass_kernels

LAYERS = 6  # whose maps are fused; each number of them is a build of its own
_TYPES = {
    "entries": "*i32",
    "table": "*i32",
    "bits": "*u8",
    "grad_query_strides": ("i32", "i32", "i32", "constexpr"),
    "mask_table": "*i64",
    "maps": ("*fp32",) * LAYERS,
} | dict.fromkeys(
    "maxima sums parts masses lse partials deltas p grad_p grad_maps shares centres log_f metrics cells losses "
    "gradient".split(),
    "*fp32",
)


@dataclass(frozen=True)
class FixedBuild:
    """One build: a `triton.jit` function, its compile-time arguments, warps and stages."""

    op: str
    function: object
    constexprs: dict[str, int | bool | str]
    num_warps: int
    num_stages: int
    types: dict[str, str]

    @property
    def name(self) -> str:
        switches = [str(key).lower() for key, value in self.constexprs.items() if value is True]
        switches += [value for value in self.constexprs.values() if isinstance(value, str)]
        dtype = [kind[1:] for kind in self.types.values()]
        return "-".join([self.function.__name__.removesuffix("_kernel"), *dtype, *switches])

    def signature(self) -> dict[str, str | tuple[str, ...]]:
        """Return the type of every argument that is no compile-time one."""
        types = _TYPES | self.types
        return {name: types.get(name, "i32") for name in self.function.arg_names if name not in self.constexprs}

    def aligned(self) -> frozenset[str | tuple[str, int]]:
        """Return arguments that are multiples of 16 at a launch: pointers, strides of ∂q."""
        signature = self.signature()
        strides = ((name, i) for name in signature if name.endswith("_strides") for i in range(3))
        return aligned_pointers(self.function, signature) | frozenset(strides)

    def source(self):
        """Return what Triton compiles."""
        return make_source(self.function, self.signature(), self.constexprs, self.aligned())

    def build(self, architecture: int) -> Build:
        """Build for an architecture."""
        return build(
            self.function,
            self.signature(),
            self.constexprs,
            arch=architecture,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            aligned=self.aligned(),
        )

    @staticmethod
    def complaints(built: Build) -> list[str]:
        """Why it is no good; empty if it is."""
        found = []
        if built.spill_stores + built.spill_loads + built.stack:
            found.append(f"spills: {built.spill_stores} STL, {built.spill_loads} LDL, {built.stack} bytes of stack")
        if built.shared > SHARED_MEMORY[built.arch]:
            found.append(f"shared memory {built.shared} of {SHARED_MEMORY[built.arch]} bytes")
        return found


def fixed_builds() -> Iterator[FixedBuild]:
    yield FixedBuild("noun_attention", map_kernels.lse_combine_kernel, {"BLOCK": 128}, 4, 3, {})
    yield FixedBuild("noun_mass", mass_kernels.mass_combine_kernel, {"BLOCK": 128}, 4, 3, {})
    yield FixedBuild("noun_attention", row_kernels.delta_sum_kernel, {"BLOCK": 128}, 4, 3, {})
    for (dtype, head_dim, block_dim), add in product(
        (("bf16", 128, 128), ("fp16", 80, 128), ("fp32", 256, 256)), (False, True)
    ):
        dims = {"HEAD_DIM": head_dim, "BLOCK_DIM": block_dim, "BLOCK_SPLITS": 8, "ADD": add}
        dims |= {("grad_query_strides", 3): 1}
        yield FixedBuild(
            "noun_attention", row_kernels.query_gradient_sum_kernel, dims, 4, 3, {"grad_query": f"*{dtype}"}
        )
    block = {"BLOCK": frame_backend.BLOCK, "column_stride": 1}
    warps = frame_backend.NUM_WARPS, frame_backend.NUM_STAGES
    for mean, separate in ((False, False), (True, False), (False, True)):
        fusion = {"MEAN": mean, "SEPARATE": separate} | block
        for kernel in (frame_kernels.prediction_kernel, frame_kernels.metrics_kernel):
            yield FixedBuild("grid_prediction", kernel, fusion, *warps, {})
        for dense in (True, False):
            yield FixedBuild("grid_prediction", frame_kernels.gradient_kernel, fusion | {"DENSE": dense}, *warps, {})
    for fusion in FUSIONS:
        dims = {"FUSION": fusion, "SEPARATE": fusion == "none"} | block
        yield FixedBuild("grid_prediction", frame_kernels.fusion_kernel, dims, *warps, {})
        for dense in (True, False):
            dense_dims = dims | {"DENSE": dense}
            yield FixedBuild("grid_prediction", frame_kernels.fusion_gradient_kernel, dense_dims, *warps, {})
    tile = {"COLUMNS": mask_backend.COLUMNS, "PIXELS": mask_backend.PIXELS}
    for want in (True, False):
        warps = mask_backend.NUM_WARPS, mask_backend.NUM_STAGES
        yield FixedBuild("mask_bce", mask_kernels.bands_kernel, {"WANT_GRADIENT": want} | tile, *warps, {})
        block = {"WANT_GRADIENT": want, "BLOCK": mask_backend.COMBINE_BLOCK} | ({} if want else {"gradient": None})
        warps = mask_backend.COMBINE_WARPS, mask_backend.NUM_STAGES
        yield FixedBuild("mask_bce", mask_kernels.combine_kernel, block, *warps, {})
