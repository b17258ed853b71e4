"""Which tiles the Triton kernels of noun attention run with: a table, nothing measured at run time.

A tile has `block_keys` keys and `block_rows · block_heads` columns, one column for each pair of row and query head of
one key head's group; groups are filled up to a power of two, so `block_heads` is 1, 2, 4, 8 or 16. The tile depends on
the number of rows, the group size, the head dimension, the dtype and the architecture, never on the length: a new video
does not compile anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bf16", "fp16", "fp32")
HEAD_DIMS = (32, 64, 80, 96, 128, 256)  # those that are built in the tests; any up to 256 is served
BLOCK_HEADS = (1, 2, 4, 8, 16)
MAX_GROUP, MAX_HEAD_DIM = 16, 256

# kernels with a tile of keys; "gradients" does ∂q and ∂k in one pass over K, the other two one of them
KERNELS = ("lse_partials", "maps", "delta_partials", "gradients", "query_gradients", "key_gradients")


@dataclass(frozen=True)
class Tile:
    block_rows: int
    block_heads: int
    block_keys: int
    num_warps: int
    num_stages: int

    @property
    def columns(self) -> int:
        return self.block_rows * self.block_heads


# Keys of a tile of "gradients" and "query_gradients", which hold ∂q beside the scores: as many, up to 64, as there are
# registers for. Tensor cores of sm_90 and sm_100 want 64; with 32 only the product that gives ∂q uses their wide form.
_GRADIENT_KEYS = {
    # columns:            32  64 128  head_dim above 128
    (80, "bf16"): (32, 32, 32, 16),
    (80, "fp16"): (32, 32, 16, 16),
    (90, "bf16"): (64, 64, 32, 64),
    (90, "fp16"): (64, 32, 32, 32),
    (100, "bf16"): (64, 64, 32, 64),
    (100, "fp16"): (64, 64, 32, 32),
}


def columns_for(kernel: str, num_rows: int, block_heads: int, head_dim: int, dtype: str) -> int:
    """Columns of a tile: 32 for few rows, else 64; 128 if that saves "gradients" from reading K once more.

    The same for all kernels but "gradients", on every architecture: it is also how the rows are cut into blocks.
    """
    if dtype == "fp32":
        return 32 if head_dim <= 128 else 16
    columns = num_rows * block_heads
    if columns <= 32 or head_dim > 128:
        return 32
    return 128 if columns > 64 and kernel == "gradients" and head_dim > 32 else 64


def choose_tile(kernel: str, num_rows: int, block_heads: int, head_dim: int, dtype: str, architecture: int) -> Tile:
    """The tile of one of `KERNELS`.

    Args:
        block_heads: one of `BLOCK_HEADS`.
        dtype: one of `DTYPES`.
        architecture: compute capability, as in 80; 12x and other 8x get the tiles of sm_80, 11x those of sm_100.
    """
    columns = columns_for(kernel, num_rows, block_heads, head_dim, dtype)
    num_warps = 8
    if dtype == "fp32":  # IEEE products are made by the ordinary cores, from operands in registers
        block_keys, num_stages = (32 if head_dim <= 128 else 16), 1
        # where ptxas spills least on sm_90
        if kernel == "key_gradients" and head_dim <= 32:
            block_keys, num_warps = 64, 4
        elif kernel == "key_gradients" and block_heads == 8 and head_dim <= 128:
            num_warps = 4
    elif kernel in ("gradients", "query_gradients"):
        place = 3 if head_dim > 128 else (32, 64, 128).index(columns)
        block_keys, num_stages = _GRADIENT_KEYS[_nearest(architecture), dtype][place], 2
        block_keys = max(block_keys, 2048 // _block_dim(head_dim))  # 16 bytes of K for each of 256 threads
    elif kernel == "delta_partials" and _nearest(architecture) == 80:
        block_keys, num_stages = 64, 1  # with 2, ptxas spills a register
    else:
        block_keys, num_stages = 64, 2
    return Tile(columns // block_heads, block_heads, block_keys, num_warps, num_stages)


def _block_dim(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _nearest(architecture: int) -> int:
    return {9: 90, 10: 100, 11: 100}.get(architecture // 10, 80)


def fits_one_block(num_rows: int, block_heads: int, head_dim: int, dtype: str, architecture: int) -> bool:
    """Whether all rows share one tile of the kernel "gradients", which then does ∂q and ∂k in one pass over K."""
    return num_rows <= choose_tile("gradients", num_rows, block_heads, head_dim, dtype, architecture).block_rows


@dataclass(frozen=True)
class Configuration:
    """One build of one kernel: what `triton.compile` needs besides the target.

    Attributes:
        kernel: one of `KERNELS`.
        architecture, dtype, head_dim: what it is for.
        tile: its tile.
        add: of the kernels that write ∂k, whether it is added to what is there (behind a flash attention's backward).
    """

    kernel: str
    architecture: int
    dtype: str
    head_dim: int
    tile: Tile
    add: bool = False

    @property
    def name(self) -> str:
        tile = self.tile
        return (
            f"{self.kernel}-sm{self.architecture}-{self.dtype}-d{self.head_dim}-"
            f"rows{tile.block_rows}x{tile.block_heads}-keys{tile.block_keys}{'-add' if self.add else ''}"
        )

    def function(self):
        """The `triton.jit` function."""
        from swim_kernels.noun_attention.triton import kernels as triton_kernels

        name = "gradients" if self.kernel.endswith("gradients") else self.kernel
        return getattr(triton_kernels, f"{name}_kernel")

    def signature(self) -> dict[str, str]:
        """Type of every argument by name in the order of the function; "constexpr" for compile-time ones.

        Strides of the head dimension are compile-time ones (1) as at a launch with unit stride.
        """
        element = f"*{self.dtype}"
        types = {}
        for name in self.function().arg_names:
            if name in self.constexprs():
                types[name] = "constexpr"
            elif name in ("query", "key", "grad_key", "grad_query"):
                types[name] = element
            elif name in ("entries", "blocks", "key_sets", "inverse", "next_column", "repeats"):
                types[name] = "*i32"
            elif name in _FP32_POINTERS:
                types[name] = "*fp32"
            else:
                types[name] = "fp32" if name == "scale" else "i32"
        return types

    def constexprs(self) -> dict[str, int | bool]:
        """Compile-time arguments, and those that a launch specialises on because they are 1."""
        ones = [name for name in self.function().arg_names if name.endswith(("stride_d", "stride_n"))]
        return tile_constexprs(self.kernel, self.head_dim, self.tile, self.add) | dict.fromkeys(ones, 1)

    def aligned(self) -> frozenset[str]:
        """Arguments that are multiples of 16 at a launch: pointers, and strides of the inputs and of ∂k."""
        types = self.signature()
        strides = (name for name in types if "_stride_" in name and types[name] != "constexpr" and "maps" not in name)
        return frozenset([*(name for name in types if types[name].startswith("*")), *strides])


_FP32_POINTERS = ("lse", "maps", "grad_maps", "deltas", "weights", "maxima", "sums", "grad_query_partials")


def tile_constexprs(kernel: str, head_dim: int, tile: Tile, add: bool = False) -> dict[str, int | bool]:
    """Compile-time arguments of one of `KERNELS` on a GPU."""
    values: dict[str, int | bool] = {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": _block_dim(head_dim),
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_HEADS": tile.block_heads,
        "BLOCK_KEYS": tile.block_keys,
        "UPCAST": False,
    }
    if kernel.endswith("gradients"):
        values["WANT_QUERY"] = kernel != "key_gradients"
        values["WANT_KEY"] = kernel != "query_gradients"
        values["ADD"] = add and kernel != "query_gradients"
    return values


def all_configurations(
    architectures=ARCHITECTURES, dtypes=DTYPES, head_dims=HEAD_DIMS, block_heads=BLOCK_HEADS, kernels=KERNELS
) -> Iterator[Configuration]:
    """Every build that the table can choose for 1 to 512 rows, each once."""
    seen = set()
    for architecture, dtype, head_dim, heads, kernel in product(architectures, dtypes, head_dims, block_heads, kernels):
        for num_rows, add in product((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (False, True)):
            if add and kernel not in ("gradients", "key_gradients"):
                continue
            tile = choose_tile(kernel, num_rows, heads, head_dim, dtype, architecture)
            configuration = Configuration(kernel, architecture, dtype, head_dim, tile, add)
            if configuration not in seen:
                seen.add(configuration)
                yield configuration
