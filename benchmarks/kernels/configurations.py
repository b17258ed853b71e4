"""Builds of the kernels of noun attention and noun mass with a tile of keys, as the table of tiles chooses them.

Kernels that always run with the same tile are in `fixed_builds.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.kernels.builds import aligned_pointers, make_source
from swim_kernels.attention_rows.triton import kernels as row_kernels
from swim_kernels.attention_rows.triton.tiles import (
    ADDING,
    KERNELS,
    OVER_SET,
    READOUTS,
    Tile,
    choose_tile,
    tile_constexprs,
)
from swim_kernels.noun_attention.triton import kernels as map_kernels
from swim_kernels.noun_mass.triton import kernels as mass_kernels

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bf16", "fp16", "fp32")
HEAD_DIMS = (32, 64, 80, 96, 128, 256)  # any up to 256 is served
BLOCK_HEADS = (1, 2, 4, 8, 16)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_FUNCTIONS = vars(map_kernels) | vars(mass_kernels) | vars(row_kernels)

_TYPES = (
    dict.fromkeys(("entries", "blocks", "key_sets", "inverse", "next_column", "repeats", "members"), "*i32")
    | dict.fromkeys(("lse", "maps", "grad_maps", "deltas", "weights", "maxima", "sums", "parts"), "*fp32")
    | {"grad_query_partials": "*fp32"}
    | {"scale": "fp32"}
    | dict.fromkeys(("query_strides", "key_strides", "grad_key_strides"), ("i32", "i32", "i32", "constexpr"))
)


@dataclass(frozen=True)
class Configuration:
    """One build of one kernel: what `triton.compile` needs besides the target.

    Attributes:
        kernel: one of `KERNELS`.
        architecture, dtype, head_dim: what it is for.
        tile: its tile.
        add: if a kernel that writes ∂k adds it to what is there (behind a flash attention's backward).
        over_set: if the softmax is over key sets.
        readout: "mean", "each" or "mass", where the build depends on it.
    """

    kernel: str
    architecture: int
    dtype: str
    head_dim: int
    tile: Tile
    add: bool = False
    over_set: bool = False
    readout: str = "mean"

    @property
    def name(self) -> str:
        tile = self.tile
        size = f"rows{tile.block_rows}x{tile.block_heads}-keys{tile.block_keys}"
        variant = "-add" * self.add + "-set" * self.over_set
        variant += f"-{self.readout}" if self.readout != "mean" else ""
        return f"{self.kernel}-sm{self.architecture}-{self.dtype}-d{self.head_dim}-{size}{variant}"

    def function(self):
        """Return the `triton.jit` function."""
        return _FUNCTIONS[f"{self.kernel}_kernel"]

    def signature(self) -> dict[str, str | tuple[str, ...]]:
        """Return the type of every argument that is no compile-time one.

        Strides of the head dimension are (1), as at a launch with unit stride.
        """
        types = _TYPES | dict.fromkeys(("query", "key", "grad_key", "grad_query"), f"*{self.dtype}")
        constexprs = self.constexprs()
        return {name: types.get(name, "i32") for name in self.function().arg_names if name not in constexprs}

    def constexprs(self) -> dict[str | tuple[str, int], int | bool | str | None]:
        """Return compile-time arguments, and those that a launch specialises on because they are 1 or None."""
        names = self.function().arg_names
        values = tile_constexprs(self.kernel, self.head_dim, self.tile, self.add, self.over_set, self.readout)
        if "members" in names and self.readout in ("mean", "each") and self.kernel in READOUTS:
            values["members"] = None
        ones = {(n, len(_TYPES[n]) - 1): 1 for n in names if n.endswith("_strides") and n not in values}
        return values | ones

    def aligned(self) -> frozenset[str | tuple[str, int]]:
        """Return arguments that are multiples of 16 at a launch: pointers, strides of the inputs and of ∂k."""
        types = self.signature()
        strides = ((name, i) for name in types if name.endswith("_strides") for i in range(3))
        return aligned_pointers(self.function(), types) | frozenset(strides)

    def source(self):
        """Return what Triton compiles."""
        return make_source(self.function(), self.signature(), self.constexprs(), self.aligned())


def all_configurations(
    architectures=ARCHITECTURES, dtypes=DTYPES, head_dims=HEAD_DIMS, block_heads=BLOCK_HEADS, kernels=KERNELS
) -> Iterator[Configuration]:
    """Yield every build that the table can choose for 1 to 512 rows, each once."""
    seen = set()
    for architecture, dtype, head_dim, heads, kernel in product(architectures, dtypes, head_dims, block_heads, kernels):
        variants = ((False, True) if kernel in table else (False,) for table in (ADDING, OVER_SET))
        readouts = READOUTS.get(kernel, ("mean",))
        for num_rows, add, over_set, readout in product(_ROWS, *variants, readouts):
            tile = choose_tile(kernel, num_rows, heads, head_dim, dtype, architecture)
            configuration = Configuration(kernel, architecture, dtype, head_dim, tile, add, over_set, readout)
            if configuration not in seen and not (add and readout == "mass"):  # masses come from no flash attention
                seen.add(configuration)
                yield configuration
