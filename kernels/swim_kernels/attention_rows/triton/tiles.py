"""Which tiles the Triton kernels of the rows run with: a table, nothing measured at run time.

A tile has `block_keys` keys and `block_rows · block_heads` columns, one column for each pair of row and query head of
one key head's group; groups are filled up to a power of two, so `block_heads` is 1, 2, 4, 8 or 16. The tile depends on
the group size, the head dimension, the dtype and the architecture, never on a length, and only that of "gradients" on
the number of rows: a new video does not compile anything.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_GROUP, MAX_HEAD_DIM = 16, 256

# with a tile of keys; "gradients" does ∂q and ∂k in one pass over K, "query_gradients" and "key_gradients" one of them
KERNELS = (
    "lse_partials",
    "maps",
    "delta_partials",
    "mass_partials",
    "gradients",
    "query_gradients",
    "key_gradients",
)

ADDING = ("gradients", "key_gradients")  # kernels that can add ∂k to what is there
# that differ where the softmax is over key sets
OVER_SET = ("lse_partials", "mass_partials", "query_gradients", "key_gradients")
# that differ by what is read out: a map for all heads, a map of each head, masses
READOUTS = {"maps": ("mean", "each"), "delta_partials": ("mean", "each")}
READOUTS |= dict.fromkeys(("gradients", "query_gradients", "key_gradients"), ("mean", "each", "mass"))


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
    # columns:       64 128  head_dim above 128
    (80, "bf16"): (32, 32, 16),
    (80, "fp16"): (32, 16, 16),
    (90, "bf16"): (64, 32, 64),
    (90, "fp16"): (32, 32, 32),
    (100, "bf16"): (64, 32, 64),
    (100, "fp16"): (64, 32, 32),
}


def columns_for(kernel: str, num_rows: int, block_heads: int, head_dim: int, dtype: str) -> int:
    """Return the columns of a tile: 64 with 16 bits; 128 if that saves "gradients" from reading K once more.

    The same for all kernels but "gradients", on every architecture: it is also how the rows are cut into blocks.
    """
    if dtype == "fp32":
        return 32 if head_dim <= 128 else 16
    if head_dim > 128:
        return 32
    return 128 if num_rows * block_heads > 64 and kernel == "gradients" and head_dim > 32 else 64


def choose_tile(kernel: str, num_rows: int, block_heads: int, head_dim: int, dtype: str, architecture: int) -> Tile:
    """Return the tile of one of `KERNELS`.

    Args:
        block_heads: heads of a group, filled up to a power of two.
        dtype: "bf16", "fp16" or "fp32".
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
        index = 2 if head_dim > 128 else (64, 128).index(columns)
        block_keys, num_stages = _GRADIENT_KEYS[_nearest(architecture), dtype][index], 2
        block_keys = max(block_keys, 2048 // _block_dim(head_dim))  # 16 bytes of K for each of 256 threads
    elif kernel == "mass_partials" and _nearest(architecture) == 80:
        block_keys, num_warps, num_stages = 32, 4, 2  # spills least
    elif kernel == "delta_partials" and _nearest(architecture) == 80:
        block_keys, num_stages = 64, 1  # with 2, ptxas spills a register
    else:
        block_keys, num_stages = 64, 2
    return Tile(columns // block_heads, block_heads, block_keys, num_warps, num_stages)


def pad_group(group: int) -> int:
    """Return the heads of a group in a tile: filled up to a power of two."""
    return 1 << (group - 1).bit_length()


def _block_dim(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _nearest(architecture: int) -> int:
    return {9: 90, 10: 100, 11: 100}.get(architecture // 10, 80)


def tile_constexprs(
    kernel: str, head_dim: int, tile: Tile, add: bool = False, over_set: bool = False, readout: str = "mean"
) -> dict[str, int | bool | str]:
    """Return the compile-time arguments of one of `KERNELS` on a GPU.

    Args:
        add: ∂k is added to what is there.
        over_set: the softmax is over key sets. "gradients" does not serve it.
        readout: as of `READOUTS`.
    """
    values: dict[str, int | bool | str] = {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": _block_dim(head_dim),
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_HEADS": tile.block_heads,
        "BLOCK_KEYS": tile.block_keys,
        "UPCAST": False,
    }
    if kernel in ADDING:
        values["ADD"] = add
    if kernel in OVER_SET:
        values["SET"] = over_set
    if kernel in READOUTS:
        values["READOUT"] = readout
    return values
