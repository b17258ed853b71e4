"""Device code that the kernels of the ops on the rows share: the tables, loads and scores of a tile.

Every tile has keys in its first dimension and (row, head of one key head's group) in its second: a tile of K is loaded
once and serves all of them; as the first operand of `tl.dot` it reaches the tensor cores' wide instructions from one
row up. No atomics; every element of every output is written by exactly one program.

Tables of the rows (`entries`, `blocks`, …) are those of `plan.py`. SET: the softmax runs over the row's key set, each
key once, and the plan's key range of a row is the span of that set. Strides are tuples over [B, H, L, D]; a head
dimension of stride 1 and 16-byte aligned strides are needed for wide loads only. Offsets are int64.
"""

import triton
import triton.language as tl

# Arguments that differ from batch to batch: no build of their own where a number happens to be 1 or 16 · n, or an
# address 16 · n. Only query, key, their gradients and the partials of ∂q are read and written many bytes at a time.
VARYING = ["scale", "length", "num_rows", "num_heads", "num_key_heads", "group", "num_columns", "num_items", "num_sets"]
VARYING += ["num_splits", "delta_splits", "grad_maps_stride", "given"]
VARYING += ["entries", "blocks", "key_sets", "inverse", "next_column", "repeats", "members"]
VARYING += ["lse", "maps", "grad_maps", "weights", "deltas", "maxima", "sums", "parts", "masses"]

# Columns of `entries`, of tables of blocks, and of both: `plan.py` fills them in this order.
ROW, SEQUENCE, POSITION, KEY_START, KEY_END, KEY_SET, NEXT, IS_FIRST = (tl.constexpr(i) for i in range(8))
_BLOCK_SEQUENCE, _FIRST, _END, _FIRST_KEY, _END_KEY, _BLOCK_KEY_SET = (tl.constexpr(i) for i in range(6))
WIDTH = tl.constexpr(8)


@triton.jit
def dot(a, b, accumulator, UPCAST: tl.constexpr):
    """a · b + accumulator, fp32; fp32 operands in IEEE precision. UPCAST: the interpreter cannot multiply bf16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def gradient_dot(a, b, accumulator, UPCAST: tl.constexpr):
    """As `dot` for one fp32 operand (score gradients) and one in the dtype of the inputs.

    bf16: score gradients are rounded to it. fp16 could not hold them, they may be far below 1: TF32, which holds fp16
    exactly. fp32: IEEE.
    """
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        return tl.dot(a, b, accumulator, input_precision="ieee")
    elif a.dtype == tl.float16 or b.dtype == tl.float16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="tf32")
    else:
        return dot(a.to(tl.bfloat16), b.to(tl.bfloat16), accumulator, UPCAST)


@triton.jit
def load_block(blocks, index):
    """Return sequence, first and end entry, first and end key, key set of a block."""
    block = blocks + tl.cast(index, tl.int64) * WIDTH
    sequence, key_set = tl.load(block + _BLOCK_SEQUENCE), tl.load(block + _BLOCK_KEY_SET)
    first, end = tl.load(block + _FIRST), tl.load(block + _END)
    return sequence, first, end, tl.load(block + _FIRST_KEY), tl.load(block + _END_KEY), key_set


@triton.jit
def load_columns(entries, first, end, group, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Return row, position, key range and head within the group of a tile's columns, and which of them exist.

    A column that stands for nothing has an empty key range.
    """
    column = tl.arange(0, BLOCK_ROWS * BLOCK_HEADS)
    entry = first + column // BLOCK_HEADS
    head = column % BLOCK_HEADS
    valid = (entry < end) & (head < group)
    entries += tl.cast(entry, tl.int64) * WIDTH
    row = tl.load(entries + ROW, mask=valid, other=0)
    position = tl.load(entries + POSITION, mask=valid, other=0)
    key_start = tl.load(entries + KEY_START, mask=valid, other=0)
    key_end = tl.load(entries + KEY_END, mask=valid, other=0)
    return row, position, key_start, key_end, head, valid


@triton.jit
def load_rows(entries, first, end, BLOCK_ROWS: tl.constexpr):
    """Return row and key set of a block's rows, and which of them exist."""
    entry = first + tl.arange(0, BLOCK_ROWS)
    valid = entry < end
    entries += tl.cast(entry, tl.int64) * WIDTH
    return tl.load(entries + ROW, mask=valid, other=0), tl.load(entries + KEY_SET, mask=valid, other=0), valid


@triton.jit
def load_query(query, strides, sequence, head, position, valid, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Return q [columns, BLOCK_DIM]."""
    dim = tl.arange(0, BLOCK_DIM)
    token = sequence.to(tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    token += position.to(tl.int64) * strides[2]
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(query + token[:, None] + dim.to(tl.int64)[None, :] * strides[3], mask=mask, other=0.0)


@triton.jit
def load_key(key, strides, sequence, head, position, valid, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Return k [BLOCK_KEYS, BLOCK_DIM]."""
    dim = tl.arange(0, BLOCK_DIM)
    key += sequence.to(tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    mask = valid[:, None]
    if HEAD_DIM != BLOCK_DIM:
        mask = mask & (dim < HEAD_DIM)[None, :]
    offset = position.to(tl.int64)[:, None] * strides[2] + dim.to(tl.int64)[None, :] * strides[3]
    return tl.load(key + offset, mask=mask, other=0.0)


@triton.jit
def own_tiles(split, length, BLOCK_KEYS: tl.constexpr):
    """Return the tiles [first, end) of a split: those of so many keys or columns, divided evenly among all splits."""
    tiles, splits = tl.cdiv(length, BLOCK_KEYS), tl.num_programs(0)
    return split * tiles // splits, (split + 1) * tiles // splits


@triton.jit
def tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS: tl.constexpr):
    """Return the tiles [first, end) of a split, and of these the ones [begin, stop) in reach of any entry."""
    first, end = own_tiles(split, length, BLOCK_KEYS)
    begin = tl.minimum(tl.maximum(first, first_key // BLOCK_KEYS), end)
    return first, begin, tl.maximum(tl.minimum(end, tl.cdiv(end_key, BLOCK_KEYS)), begin), end


@triton.jit
def compute_scores(k, q, scale, UPCAST: tl.constexpr):
    """Return s [BLOCK_KEYS, columns]. Scaled afterwards: a scaled q would be a rounded one."""
    zero = tl.zeros([k.shape[0], q.shape[0]], dtype=tl.float32)
    return dot(k, tl.trans(q), zero, UPCAST) * scale


@triton.jit
def find_inside(position, key_start, key_end):
    """Return which keys are in the range of a column's row [BLOCK_KEYS, columns]."""
    return (position[:, None] >= key_start[None, :]) & (position[:, None] < key_end[None, :])


@triton.jit
def compute_probabilities(k, q, inside, lse, scale, UPCAST: tl.constexpr):
    """Return p [BLOCK_KEYS, columns], exactly 0 outside the ranges."""
    return tl.where(inside, tl.exp(compute_scores(k, q, scale, UPCAST) - lse[None, :]), 0.0)


@triton.jit
def per_head(values, BLOCK_HEADS: tl.constexpr):
    """Return values [BLOCK_KEYS, BLOCK_ROWS] of the rows for their heads [BLOCK_KEYS, columns]."""
    keys: tl.constexpr = values.shape[0]
    rows: tl.constexpr = values.shape[1]
    repeated = tl.broadcast_to(values[:, :, None], [keys, rows, BLOCK_HEADS])
    return tl.reshape(repeated, [keys, rows * BLOCK_HEADS])
