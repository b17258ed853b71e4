"""Noun attention, device code. Mathematics in `reference.py`, tiling in `kernels/README.md`.

    lse     lse_partials_kernel, lse_combine_kernel
    maps    maps_kernel                    a[r,n]    = (1/Hq) Σ_h exp(s[r,h,key of n] − lse[r,h])
    δ       delta_partials_kernel, delta_sum_kernel
                                           δ[r,h]    = (1/Hq) Σ_n p[r,h,key of n] · ∂a[r,n]
    ∂q, ∂k  gradients_kernel, or query_gradients_kernel and key_gradients_kernel; query_gradient_sum_kernel
                                           ds[r,h,j] = p[r,h,j] · (w[r,j] − δ[r,h])

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
_VARYING = ["scale", "length", "num_rows", "num_heads", "num_key_heads", "group", "num_columns", "num_items"]
_VARYING += ["num_splits", "delta_splits", "grad_maps_stride"]
_VARYING += ["entries", "blocks", "key_sets", "inverse", "next_column", "repeats"]
_VARYING += ["lse", "maps", "grad_maps", "weights", "deltas", "maxima", "sums"]


# Columns of `entries`, of tables of blocks, and of both: `plan.py` fills them in this order.
_ROW, _SEQUENCE, _POSITION, _KEY_START, _KEY_END, _KEY_SET, _NEXT, _IS_FIRST = (tl.constexpr(i) for i in range(8))
_BLOCK_SEQUENCE, _FIRST, _END, _FIRST_KEY, _END_KEY, _BLOCK_KEY_SET = (tl.constexpr(i) for i in range(6))
_WIDTH = tl.constexpr(8)


@triton.jit
def _dot(a, b, accumulator, UPCAST: tl.constexpr):
    """a · b + accumulator, fp32; fp32 operands in IEEE precision. UPCAST: the interpreter cannot multiply bf16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _gradient_dot(a, b, accumulator, UPCAST: tl.constexpr):
    """As `_dot` for one fp32 operand (score gradients) and one in the dtype of the inputs.

    bf16: score gradients are rounded to it. fp16 could not hold them, they may be far below 1: TF32, which holds fp16
    exactly. fp32: IEEE.
    """
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        return tl.dot(a, b, accumulator, input_precision="ieee")
    elif a.dtype == tl.float16 or b.dtype == tl.float16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="tf32")
    else:
        return _dot(a.to(tl.bfloat16), b.to(tl.bfloat16), accumulator, UPCAST)


@triton.jit
def _load_block(blocks, index):
    """Return sequence, first and end entry, first and end key, key set of a block."""
    block = blocks + tl.cast(index, tl.int64) * _WIDTH
    sequence, key_set = tl.load(block + _BLOCK_SEQUENCE), tl.load(block + _BLOCK_KEY_SET)
    first, end = tl.load(block + _FIRST), tl.load(block + _END)
    return sequence, first, end, tl.load(block + _FIRST_KEY), tl.load(block + _END_KEY), key_set


@triton.jit
def _load_columns(entries, first, end, group, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Return row, position, key range and head within the group of a tile's columns, and which of them exist.

    A column that stands for nothing has an empty key range.
    """
    column = tl.arange(0, BLOCK_ROWS * BLOCK_HEADS)
    entry = first + column // BLOCK_HEADS
    head = column % BLOCK_HEADS
    valid = (entry < end) & (head < group)
    entries += tl.cast(entry, tl.int64) * _WIDTH
    row = tl.load(entries + _ROW, mask=valid, other=0)
    position = tl.load(entries + _POSITION, mask=valid, other=0)
    key_start = tl.load(entries + _KEY_START, mask=valid, other=0)
    key_end = tl.load(entries + _KEY_END, mask=valid, other=0)
    return row, position, key_start, key_end, head, valid


@triton.jit
def _load_rows(entries, first, end, BLOCK_ROWS: tl.constexpr):
    """Return row and key set of a block's rows, and which of them exist."""
    entry = first + tl.arange(0, BLOCK_ROWS)
    valid = entry < end
    entries += tl.cast(entry, tl.int64) * _WIDTH
    return tl.load(entries + _ROW, mask=valid, other=0), tl.load(entries + _KEY_SET, mask=valid, other=0), valid


@triton.jit
def _load_query(query, strides, sequence, head, position, valid, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Return q [columns, BLOCK_DIM]."""
    dim = tl.arange(0, BLOCK_DIM)
    token = sequence.to(tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    token += position.to(tl.int64) * strides[2]
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(query + token[:, None] + dim.to(tl.int64)[None, :] * strides[3], mask=mask, other=0.0)


@triton.jit
def _load_key(key, strides, sequence, head, position, valid, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Return k [BLOCK_KEYS, BLOCK_DIM]."""
    dim = tl.arange(0, BLOCK_DIM)
    key += sequence.to(tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    mask = valid[:, None]
    if HEAD_DIM != BLOCK_DIM:
        mask = mask & (dim < HEAD_DIM)[None, :]
    offset = position.to(tl.int64)[:, None] * strides[2] + dim.to(tl.int64)[None, :] * strides[3]
    return tl.load(key + offset, mask=mask, other=0.0)


@triton.jit
def _own_tiles(split, length, BLOCK_KEYS: tl.constexpr):
    """Return the tiles [first, end) of a split: those of so many keys or columns, divided evenly among all splits."""
    tiles, splits = tl.cdiv(length, BLOCK_KEYS), tl.num_programs(0)
    return split * tiles // splits, (split + 1) * tiles // splits


@triton.jit
def _tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS: tl.constexpr):
    """Return the tiles [first, end) of a split, and of these the ones [begin, stop) in reach of any entry."""
    first, end = _own_tiles(split, length, BLOCK_KEYS)
    begin = tl.minimum(tl.maximum(first, first_key // BLOCK_KEYS), end)
    return first, begin, tl.maximum(tl.minimum(end, tl.cdiv(end_key, BLOCK_KEYS)), begin), end


@triton.jit
def _scores(k, q, scale, UPCAST: tl.constexpr):
    """Return s [BLOCK_KEYS, columns]. Scaled afterwards: a scaled q would be a rounded one."""
    zero = tl.zeros([k.shape[0], q.shape[0]], dtype=tl.float32)
    return _dot(k, tl.trans(q), zero, UPCAST) * scale


@triton.jit
def _inside(position, key_start, key_end):
    """Return which keys are in the range of a column's row [BLOCK_KEYS, columns]."""
    return (position[:, None] >= key_start[None, :]) & (position[:, None] < key_end[None, :])


@triton.jit
def _probabilities(k, q, inside, lse, scale, UPCAST: tl.constexpr):
    """Return p [BLOCK_KEYS, columns], exactly 0 outside the ranges."""
    return tl.where(inside, tl.exp(_scores(k, q, scale, UPCAST) - lse[None, :]), 0.0)


@triton.jit
def _per_head(values, BLOCK_HEADS: tl.constexpr):
    """Return values [BLOCK_KEYS, BLOCK_ROWS] of the rows for their heads [BLOCK_KEYS, columns]."""
    keys: tl.constexpr = values.shape[0]
    rows: tl.constexpr = values.shape[1]
    repeated = tl.broadcast_to(values[:, :, None], [keys, rows, BLOCK_HEADS])
    return tl.reshape(repeated, [keys, rows * BLOCK_HEADS])


@triton.jit(do_not_specialize=_VARYING)
def lse_partials_kernel(
    query, key, entries, blocks, key_sets, inverse, maxima, sums,
    scale, length, num_rows, num_heads, group, num_columns,
    query_strides, key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, SET: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum and Σ exp(s − maximum) over a split of the keys, [splits, R, Hq] each. Grid: splits, Hkv, blocks.

    With SET a split is one of the columns of the block's key set.
    """
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, first_key, end_key, key_set = _load_block(blocks, block)
    if first >= end:
        return
    row, position, key_start, key_end, head, valid = _load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    head += key_head * group
    q = _load_query(query, query_strides, sequence, head, position, valid, HEAD_DIM, BLOCK_DIM)

    maximum = tl.full([BLOCK_ROWS * BLOCK_HEADS], -3.0e38, dtype=tl.float32)  # not −inf: −inf − (−inf) is NaN
    total = tl.zeros([BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    if SET:
        begin, stop = _own_tiles(split, num_columns, BLOCK_KEYS)
    else:
        _, begin, stop, _ = _tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    for tile in range(begin, stop):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        if SET:
            n = j
            j = tl.load(key_sets + key_set.to(tl.int64) * num_columns + n, mask=n < num_columns, other=-1)
            column = tl.load(inverse + key_set.to(tl.int64) * length + j, mask=j >= 0, other=-1)
            counts = (j >= 0) & (column == n)  # a key that is named again counts once
            inside = _inside(j, key_start, key_end) & counts[:, None]
        else:
            counts = (j >= first_key) & (j < end_key)
            inside = _inside(j, key_start, key_end)
        k = _load_key(key, key_strides, sequence, key_head, j, counts, HEAD_DIM, BLOCK_DIM)
        s = tl.where(inside, _scores(k, q, scale, UPCAST), float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(s, axis=0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(s - new_maximum[None, :]), axis=0)
        maximum = new_maximum
    offset = (tl.cast(split, tl.int64) * num_rows + row) * num_heads + head
    tl.store(maxima + offset, maximum, mask=valid)
    tl.store(sums + offset, total, mask=valid)


@triton.jit(do_not_specialize=_VARYING)
def lse_combine_kernel(maxima, sums, lse, num_items, num_splits, BLOCK: tl.constexpr):
    """lse [R · Hq] of the partials [splits, R · Hq]; 0 where the range was empty. Grid: R · Hq / BLOCK."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = item < num_items
    maximum = tl.full([BLOCK], -3.0e38, dtype=tl.float32)
    for split in range(num_splits):
        offset = item + tl.cast(split, tl.int64) * num_items
        maximum = tl.maximum(maximum, tl.load(maxima + offset, mask=valid, other=-3.0e38))
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(num_splits):
        offset = item + tl.cast(split, tl.int64) * num_items
        m = tl.load(maxima + offset, mask=valid, other=-3.0e38)
        total += tl.load(sums + offset, mask=valid, other=0.0) * tl.exp(m - maximum)
    tl.store(lse + item, tl.where(total > 0, maximum + tl.log(tl.where(total > 0, total, 1.0)), 0.0), mask=valid)


@triton.jit(do_not_specialize=_VARYING)
def maps_kernel(
    query, key, lse, entries, blocks, key_sets, maps,
    scale, num_rows, num_heads, num_key_heads, group, num_columns,
    query_strides, key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a [R, N]. Grid: tiles of the key set, blocks of one sequence and key set. The head mean is written once."""
    tile, block = tl.program_id(0), tl.program_id(1)
    sequence, first, end, _, _, key_set = _load_block(blocks, block)
    if first >= end:
        return
    n = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    j = tl.load(key_sets + key_set.to(tl.int64) * num_columns + n, mask=n < num_columns, other=-1)
    row, position, key_start, key_end, head, valid = _load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    inside = _inside(j, key_start, key_end)  # the padding −1 is in no range
    lse += row.to(tl.int64) * num_heads + head
    acc = tl.zeros([BLOCK_KEYS, BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    for key_head in range(num_key_heads):
        first_head = key_head * group
        q = _load_query(query, query_strides, sequence, first_head + head, position, valid, HEAD_DIM, BLOCK_DIM)
        k = _load_key(key, key_strides, sequence, key_head, j, j >= 0, HEAD_DIM, BLOCK_DIM)
        acc += _probabilities(k, q, inside, tl.load(lse + first_head, mask=valid, other=0.0), scale, UPCAST)
    mean = tl.sum(tl.reshape(acc, [BLOCK_KEYS, BLOCK_ROWS, BLOCK_HEADS]), axis=2) / num_heads
    row, _, valid = _load_rows(entries, first, end, BLOCK_ROWS)
    offset = row.to(tl.int64)[None, :] * num_columns + n[:, None]
    tl.store(maps + offset, mean, mask=valid[None, :] & (n < num_columns)[:, None])


@triton.jit(do_not_specialize=_VARYING)
def delta_partials_kernel(
    query, key, lse, grad_maps, entries, blocks, key_sets, next_column, repeats, deltas, weights,
    scale, num_rows, num_heads, group, num_columns,
    query_strides, key_strides, grad_maps_stride,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ p · ∂a/Hq over a split of the key set, [splits, R, Hq]. Grid: splits, Hkv, blocks of one key set.

    Only keys that are read out are loaded. The programs of the first key head also write the weights [R, N]: Σ ∂a/Hq
    over a column and the later ones that name the same key. The first column of a key so has the weight of the key.
    """
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, _, _, key_set = _load_block(blocks, block)
    if first >= end:
        return
    row, position, key_start, key_end, head, valid = _load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    head += key_head * group
    q = _load_query(query, query_strides, sequence, head, position, valid, HEAD_DIM, BLOCK_DIM)
    row_lse = tl.load(lse + row.to(tl.int64) * num_heads + head, mask=valid, other=0.0)
    block_row, _, block_valid = _load_rows(entries, first, end, BLOCK_ROWS)
    grad_maps += block_row.to(tl.int64)[None, :] * grad_maps_stride
    key_sets += key_set.to(tl.int64) * num_columns

    delta = tl.zeros([BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    begin, stop = _own_tiles(split, num_columns, BLOCK_KEYS)
    for tile in range(begin, stop):
        n = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        j = tl.load(key_sets + n, mask=n < num_columns, other=-1)
        k = _load_key(key, key_strides, sequence, key_head, j, j >= 0, HEAD_DIM, BLOCK_DIM)
        inside = _inside(j, key_start, key_end)
        p = _probabilities(k, q, inside, row_lse, scale, UPCAST)
        mask = (j >= 0)[:, None] & block_valid[None, :]
        w = tl.load(grad_maps + n[:, None], mask=mask, other=0.0) / num_heads
        delta += tl.sum(tl.where(inside, p * _per_head(w, BLOCK_HEADS), 0.0), axis=0)
    tl.store(deltas + (tl.cast(split, tl.int64) * num_rows + row) * num_heads + head, delta, mask=valid)

    if key_head == 0:
        next_of_set = next_column + key_set.to(tl.int64) * num_columns
        weights_of_rows = weights + block_row.to(tl.int64)[None, :] * num_columns
        times = tl.load(repeats) + 1
        for tile in range(begin, stop):
            n = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            column = tl.where(n < num_columns, n, -1)
            total = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], dtype=tl.float32)
            for _again in range(times):
                mask = (column >= 0)[:, None] & block_valid[None, :]
                total += tl.load(grad_maps + column[:, None], mask=mask, other=0.0)
                column = tl.load(next_of_set + column, mask=column >= 0, other=-1)
            mask = (n < num_columns)[:, None] & block_valid[None, :]
            tl.store(weights_of_rows + n[:, None], total / num_heads, mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def delta_sum_kernel(partials, deltas, num_items, num_splits, BLOCK: tl.constexpr):
    """δ [R · Hq] of the partials [splits, R · Hq]. Grid: R · Hq / BLOCK."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(num_splits):
        total += tl.load(partials + item + tl.cast(split, tl.int64) * num_items, mask=item < num_items, other=0.0)
    tl.store(deltas + item, total, mask=item < num_items)


@triton.jit
def _load_weights(weights, inverse, rows, j, inside, length, num_columns, BLOCK_HEADS: tl.constexpr, SET: tl.constexpr):
    """Return w [BLOCK_KEYS, columns] of `_load_rows`, and of the keys `inside` the ranges those of the softmax.

    `inverse` [G, L] is the first column that names the key, −1 if there is none.
    """
    row, key_set, valid = rows
    mask = valid[None, :] & (j < length)[:, None]
    column = tl.load(inverse + key_set.to(tl.int64)[None, :] * length + j[:, None], mask=mask, other=-1)
    w = tl.load(weights + row.to(tl.int64)[None, :] * num_columns + column, mask=column >= 0, other=0.0)
    if SET:
        inside = inside & (_per_head(column, BLOCK_HEADS) >= 0)
    return _per_head(w, BLOCK_HEADS), inside


@triton.jit
def _sum_deltas(deltas, row, head, valid, num_rows, num_heads, num_splits):
    """Return δ [columns] of the partials [splits, R, Hq], many of them loaded at a time."""
    offset = row.to(tl.int64) * num_heads + head
    delta = tl.zeros(row.shape, dtype=tl.float32)
    for start in range(0, num_splits, 16):
        split = start + tl.arange(0, 16)
        mask = (split < num_splits)[:, None] & valid[None, :]
        partials = deltas + split.to(tl.int64)[:, None] * (num_rows * num_heads) + offset[None, :]
        delta += tl.sum(tl.load(partials, mask=mask, other=0.0), axis=0)
    return delta


@triton.jit
def _load_for_gradient(
    query, query_strides, lse, deltas, entries, columns, sequence, first_head, first, end,
    num_rows, num_heads, delta_splits,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Return q, lse and δ of a tile's columns, given as of `_load_columns`, their head, and the block's rows.

    delta_splits: number of partials whose sum is δ; None: δ itself is given.
    """
    row, position, _, _, head, valid = columns
    head += first_head
    q = _load_query(query, query_strides, sequence, head, position, valid, HEAD_DIM, BLOCK_DIM)
    row_lse = tl.load(lse + row.to(tl.int64) * num_heads + head, mask=valid, other=0.0)
    if delta_splits is None:
        delta = tl.load(deltas + row.to(tl.int64) * num_heads + head, mask=valid, other=0.0)
    else:
        delta = _sum_deltas(deltas, row, head, valid, num_rows, num_heads, delta_splits)
    return q, row_lse, delta, head, _load_rows(entries, first, end, BLOCK_ROWS)


@triton.jit
def _score_gradient(k, q, w, inside, lse, delta, scale, UPCAST: tl.constexpr):
    """Return ds = p · (w − δ) [BLOCK_KEYS, columns], exactly 0 outside the softmax."""
    p = _probabilities(k, q, inside, lse, scale, UPCAST)
    return tl.where(inside, p * (w - delta[None, :]), 0.0)


@triton.jit
def _store_key_gradient(
    grad_key, strides, values, j, length,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK_DIM)
    offset = j.to(tl.int64)[:, None] * strides[2] + dim.to(tl.int64)[None, :] * strides[3]
    mask = (j < length)[:, None] & (dim < HEAD_DIM)[None, :]
    if ADD:
        values += tl.load(grad_key + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_key + offset, values.to(grad_key.dtype.element_ty), mask=mask)


@triton.jit
def _zero_out_of_reach(
    grad_key, strides, first, begin, stop, end, length,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype=tl.float32)
    for tile in range(first, begin):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        _store_key_gradient(grad_key, strides, zero, j, length, HEAD_DIM, BLOCK_DIM, False)
    for tile in range(stop, end):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        _store_key_gradient(grad_key, strides, zero, j, length, HEAD_DIM, BLOCK_DIM, False)


@triton.jit
def _store_query_gradient(
    partials, grad_query, split, row, head, valid, num_rows, num_heads, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Store ∂q [BLOCK_DIM, columns], transposed so that again the long dimension is the first, as a partial."""
    dim = tl.arange(0, BLOCK_DIM)
    offset = ((tl.cast(split, tl.int64) * num_rows + row) * num_heads + head) * HEAD_DIM
    tl.store(partials + offset[None, :] + dim[:, None], grad_query, mask=(dim < HEAD_DIM)[:, None] & valid[None, :])


@triton.jit(do_not_specialize=_VARYING)
def gradients_kernel(
    query, key, lse, weights, deltas, entries, blocks, inverse, grad_query_partials, grad_key,
    scale, length, num_rows, num_heads, group, num_columns, delta_splits,
    query_strides, key_strides, grad_key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, ADD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """∂q partials [splits, R, Hq, D] and ∂k over a split of the keys, K loaded once. Grid: splits, Hkv, sequences.

    ∂q = scale Σ_j ds · k and ∂k = scale Σ_{r, h in group} ds · q, with δ = Σ of `delta_splits`. A block is all entries
    of a sequence, at most BLOCK_ROWS: every key of it is written, those in no range as zeros. With ADD, ∂k is added to
    what is there. The softmax is over ranges.
    """
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, first_key, end_key, _ = _load_block(blocks, block)
    first_tile, begin, stop, end_tile = _tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    grad_key += sequence.to(tl.int64) * grad_key_strides[0] + tl.cast(key_head, tl.int64) * grad_key_strides[1]
    if not ADD:
        _zero_out_of_reach(
            grad_key, grad_key_strides, first_tile, begin, stop, end_tile, length, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS
        )
    columns = _load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    row, _, key_start, key_end, _, valid = columns
    q, row_lse, delta, head, rows = _load_for_gradient(
        query, query_strides, lse, deltas, entries, columns, sequence, key_head * group, first, end,
        num_rows, num_heads, delta_splits, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
    )  # fmt: skip
    grad_query = tl.zeros([BLOCK_DIM, BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    for tile in range(begin, stop):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = _load_key(key, key_strides, sequence, key_head, j, (j >= first_key) & (j < end_key), HEAD_DIM, BLOCK_DIM)
        inside = _inside(j, key_start, key_end)
        w, inside = _load_weights(weights, inverse, rows, j, inside, length, num_columns, BLOCK_HEADS, False)
        ds = _score_gradient(k, q, w, inside, row_lse, delta, scale, UPCAST)
        grad_query = _gradient_dot(tl.trans(k), ds, grad_query, UPCAST)
        values = _gradient_dot(ds, q, tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype=tl.float32), UPCAST) * scale
        _store_key_gradient(grad_key, grad_key_strides, values, j, length, HEAD_DIM, BLOCK_DIM, ADD)
    _store_query_gradient(
        grad_query_partials, grad_query * scale, split, row, head, valid, num_rows, num_heads, HEAD_DIM, BLOCK_DIM
    )


@triton.jit(do_not_specialize=_VARYING)
def query_gradients_kernel(
    query, key, lse, weights, deltas, entries, blocks, inverse, grad_query_partials,
    scale, length, num_rows, num_heads, group, num_columns,
    query_strides, key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, SET: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """∂q partials as in `gradients_kernel`, for blocks of any number of entries. Grid: splits, Hkv, blocks."""
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, first_key, end_key, _ = _load_block(blocks, block)
    if first >= end:
        return
    _, begin, stop, _ = _tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    columns = _load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    row, _, key_start, key_end, _, valid = columns
    q, row_lse, delta, head, rows = _load_for_gradient(
        query, query_strides, lse, deltas, entries, columns, sequence, key_head * group, first, end,
        num_rows, num_heads, None, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
    )  # fmt: skip
    grad_query = tl.zeros([BLOCK_DIM, BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    for tile in range(begin, stop):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = _load_key(key, key_strides, sequence, key_head, j, (j >= first_key) & (j < end_key), HEAD_DIM, BLOCK_DIM)
        inside = _inside(j, key_start, key_end)
        w, inside = _load_weights(weights, inverse, rows, j, inside, length, num_columns, BLOCK_HEADS, SET)
        ds = _score_gradient(k, q, w, inside, row_lse, delta, scale, UPCAST)
        grad_query = _gradient_dot(tl.trans(k), ds, grad_query, UPCAST)
    _store_query_gradient(
        grad_query_partials, grad_query * scale, split, row, head, valid, num_rows, num_heads, HEAD_DIM, BLOCK_DIM
    )


@triton.jit(do_not_specialize=_VARYING)
def key_gradients_kernel(
    query, key, lse, weights, deltas, entries, blocks, inverse, grad_key,
    scale, length, num_rows, num_heads, group, num_columns,
    query_strides, key_strides, grad_key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, SET: tl.constexpr, ADD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """∂k as in `gradients_kernel`, for any number of entries: the program of a tile walks over all of a sequence.

    With ADD, tiles that are in no row's reach are left alone.
    """
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, first_key, end_key, _ = _load_block(blocks, block)
    first_tile, begin, stop, end_tile = _tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    grad_key += sequence.to(tl.int64) * grad_key_strides[0] + tl.cast(key_head, tl.int64) * grad_key_strides[1]
    if not ADD:
        _zero_out_of_reach(
            grad_key, grad_key_strides, first_tile, begin, stop, end_tile, length, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS
        )
    for tile in range(begin, stop):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = _load_key(key, key_strides, sequence, key_head, j, (j >= first_key) & (j < end_key), HEAD_DIM, BLOCK_DIM)
        values = tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype=tl.float32)
        reached = 0
        for entry in range(first, end, BLOCK_ROWS):
            columns = _load_columns(entries, entry, end, group, BLOCK_ROWS, BLOCK_HEADS)
            inside = _inside(j, columns[2], columns[3])  # their ranges
            # Packed neighbours, patches: most tiles are out of most rows' reach.
            if tl.max(tl.max(inside.to(tl.int32), axis=1), axis=0) > 0:
                q, row_lse, delta, head, rows = _load_for_gradient(
                    query, query_strides, lse, deltas, entries, columns, sequence, key_head * group, entry, end,
                    num_rows, num_heads, None, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
                )  # fmt: skip
                w, inside = _load_weights(weights, inverse, rows, j, inside, length, num_columns, BLOCK_HEADS, SET)
                ds = _score_gradient(k, q, w, inside, row_lse, delta, scale, UPCAST)
                values = _gradient_dot(ds, q, values, UPCAST)
                reached += 1
        if ADD:
            if reached > 0:
                _store_key_gradient(grad_key, grad_key_strides, values * scale, j, length, HEAD_DIM, BLOCK_DIM, True)
        else:
            _store_key_gradient(grad_key, grad_key_strides, values * scale, j, length, HEAD_DIM, BLOCK_DIM, False)


@triton.jit(do_not_specialize=_VARYING)
def query_gradient_sum_kernel(
    partials, entries, grad_query,
    num_rows, num_heads, num_splits,
    grad_query_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """∂q of the rows' tokens: Σ of the partials over splits and over the rows of one token. Grid: R, Hq.

    The program of a token's first entry adds all of its entries, one after the other; with ADD, also what is there.
    """
    entry, head = tl.program_id(0), tl.program_id(1)
    table = entries + tl.cast(entry, tl.int64) * _WIDTH
    if tl.load(table + _IS_FIRST) == 0:
        return
    sequence, position = tl.load(table + _SEQUENCE).to(tl.int64), tl.load(table + _POSITION).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_DIM], dtype=tl.float32)
    while entry >= 0:
        table = entries + tl.cast(entry, tl.int64) * _WIDTH
        row = tl.load(table + _ROW).to(tl.int64)
        for start in range(0, num_splits, BLOCK_SPLITS):
            split = start + tl.arange(0, BLOCK_SPLITS)
            offset = ((tl.cast(split, tl.int64) * num_rows + row) * num_heads + head) * HEAD_DIM
            mask = (split < num_splits)[:, None] & (dim < HEAD_DIM)[None, :]
            total += tl.sum(tl.load(partials + offset[:, None] + dim[None, :], mask=mask, other=0.0), axis=0)
        entry = tl.load(table + _NEXT)
    grad_query += sequence * grad_query_strides[0] + tl.cast(head, tl.int64) * grad_query_strides[1]
    grad_query += position * grad_query_strides[2] + dim.to(tl.int64) * grad_query_strides[3]
    if ADD:
        total += tl.load(grad_query, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(grad_query, total.to(grad_query.dtype.element_ty), mask=dim < HEAD_DIM)
