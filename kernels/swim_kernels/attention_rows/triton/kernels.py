"""The rows' gradients, device code. Mathematics in `row_groups.py`, tiling in `kernels/README.md`.

    δ       delta_sum_kernel, where an op has it in parts
    ∂q, ∂k  gradients_kernel, or query_gradients_kernel and key_gradients_kernel; query_gradient_sum_kernel
                                           ds[r,h,j] = p[r,h,j] · (w[r,h,j] − δ[r,h])

READOUT says what w is the sum of: "mean" and "each", the gradients of the columns of a map that name the key, a map for
all heads or one for each; "mass", those of the sets that the key is in.
"""

import triton
import triton.language as tl

from swim_kernels.attention_rows.triton.device import (
    IS_FIRST,
    NEXT,
    POSITION,
    ROW,
    SEQUENCE,
    VARYING,
    WIDTH,
    compute_probabilities,
    find_inside,
    gradient_dot,
    load_block,
    load_columns,
    load_key,
    load_query,
    load_rows,
    per_head,
    tiles_in_reach,
)


@triton.jit(do_not_specialize=VARYING)
def delta_sum_kernel(partials, deltas, num_items, num_splits, BLOCK: tl.constexpr):
    """δ [R · Hq] of the partials [splits, R · Hq]. Grid: R · Hq / BLOCK."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(num_splits):
        total += tl.load(partials + item + tl.cast(split, tl.int64) * num_items, mask=item < num_items, other=0.0)
    tl.store(deltas + item, total, mask=item < num_items)


@triton.jit
def _sum_over_sets(
    weights, members, row, key_set, valid, first_head, j, mask, length, group, num_heads, num_sets,
    BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Return the sum [BLOCK_KEYS, columns] of the weights of the sets that a key is in."""
    head = tl.arange(0, BLOCK_HEADS)
    item = row.to(tl.int64)[:, None] * num_heads + (first_head + head)[None, :]
    known = valid[:, None] & (head < group)[None, :]
    words = members + key_set.to(tl.int64)[None, :] * tl.cdiv(num_sets, 32) * length + j[:, None]
    w = tl.zeros([j.shape[0], row.shape[0], BLOCK_HEADS], dtype=tl.float32)
    for first in range(0, num_sets, 32):
        word = tl.load(words + tl.cast(first // 32, tl.int64) * length, mask=mask, other=0)
        for index in range(first, tl.minimum(first + 32, num_sets)):
            weight = tl.load(weights + item * num_sets + index, mask=known, other=0.0)
            chosen = ((word >> (index - first)) & 1) != 0
            w += tl.where(chosen[:, :, None], weight[None, :, :], 0.0)
    return tl.reshape(w, [j.shape[0], row.shape[0] * BLOCK_HEADS])


@triton.jit
def _load_weights(
    weights, inverse, members, columns, first_head, rows, j, inside, length, group, num_heads, num_columns,
    BLOCK_HEADS: tl.constexpr, SET: tl.constexpr, READOUT: tl.constexpr,
):  # fmt: skip
    """Return w [BLOCK_KEYS, columns], and of the keys `inside` the ranges those of the softmax.

    weights: by READOUT, "mean": [R, N] of the columns of the key sets; "each": [R, Hq, N]; "mass": [R, Hq, S] of the
    sets. N or S is `num_columns`.
    inverse: [G, L] the first column that names the key, −1 if there is none.
    members: [G, ⌈S / 32⌉, L] the sets that the key is in, a bit each; None if weights are those of columns.
    columns, rows: of `load_columns` and `load_rows`.
    first_head: of the key head's group.
    """
    block_row, key_set, valid = rows
    mask = valid[None, :] & (j < length)[:, None]
    if SET or READOUT != "mass":
        column = tl.load(inverse + key_set.to(tl.int64)[None, :] * length + j[:, None], mask=mask, other=-1)
        if SET:
            inside = inside & (per_head(column, BLOCK_HEADS) >= 0)
    if READOUT == "mean":
        w = tl.load(weights + block_row.to(tl.int64)[None, :] * num_columns + column, mask=column >= 0, other=0.0)
        w = per_head(w, BLOCK_HEADS)
    elif READOUT == "each":
        column = per_head(column, BLOCK_HEADS)
        item = columns[0].to(tl.int64) * num_heads + first_head + columns[4]
        mask = (column >= 0) & columns[5][None, :]
        w = tl.load(weights + item[None, :] * num_columns + column, mask=mask, other=0.0)
    else:
        w = _sum_over_sets(
            weights, members, block_row, key_set, valid, first_head, j, mask, length, group, num_heads, num_columns,
            BLOCK_HEADS,
        )  # fmt: skip
    return w, inside


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
    """Return q, lse and δ of a tile's columns, given as of `load_columns`, their head, and the block's rows.

    delta_splits: number of partials whose sum is δ; None: δ itself is given.
    """
    row, position, _, _, head, valid = columns
    head += first_head
    q = load_query(query, query_strides, sequence, head, position, valid, HEAD_DIM, BLOCK_DIM)
    row_lse = tl.load(lse + row.to(tl.int64) * num_heads + head, mask=valid, other=0.0)
    if delta_splits is None:
        delta = tl.load(deltas + row.to(tl.int64) * num_heads + head, mask=valid, other=0.0)
    else:
        delta = _sum_deltas(deltas, row, head, valid, num_rows, num_heads, delta_splits)
    return q, row_lse, delta, head, load_rows(entries, first, end, BLOCK_ROWS)


@triton.jit
def _score_gradient(k, q, w, inside, lse, delta, scale, UPCAST: tl.constexpr):
    """Return ds = p · (w − δ) [BLOCK_KEYS, columns], exactly 0 outside the softmax."""
    p = compute_probabilities(k, q, inside, lse, scale, UPCAST)
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


@triton.jit(do_not_specialize=VARYING)
def gradients_kernel(
    query, key, lse, weights, deltas, entries, blocks, inverse, members, grad_query_partials, grad_key,
    scale, length, num_rows, num_heads, group, num_columns, delta_splits,
    query_strides, key_strides, grad_key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, ADD: tl.constexpr, READOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """∂q partials [splits, R, Hq, D] and ∂k over a split of the keys, K loaded once. Grid: splits, Hkv, sequences.

    ∂q = scale Σ_j ds · k and ∂k = scale Σ_{r, h in group} ds · q, with δ = Σ of `delta_splits`. A block is all entries
    of a sequence, at most BLOCK_ROWS: every key of it is written, those in no range as zeros. With ADD, ∂k is added to
    what is there. The softmax is over ranges.
    """
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, first_key, end_key, _ = load_block(blocks, block)
    first_tile, begin, stop, end_tile = tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    grad_key += sequence.to(tl.int64) * grad_key_strides[0] + tl.cast(key_head, tl.int64) * grad_key_strides[1]
    if not ADD:
        _zero_out_of_reach(
            grad_key, grad_key_strides, first_tile, begin, stop, end_tile, length, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS
        )
    columns = load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    row, _, key_start, key_end, _, valid = columns
    q, row_lse, delta, head, rows = _load_for_gradient(
        query, query_strides, lse, deltas, entries, columns, sequence, key_head * group, first, end,
        num_rows, num_heads, delta_splits, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
    )  # fmt: skip
    grad_query = tl.zeros([BLOCK_DIM, BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    for tile in range(begin, stop):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = load_key(key, key_strides, sequence, key_head, j, (j >= first_key) & (j < end_key), HEAD_DIM, BLOCK_DIM)
        inside = find_inside(j, key_start, key_end)
        w, inside = _load_weights(
            weights, inverse, members, columns, key_head * group, rows, j, inside,
            length, group, num_heads, num_columns, BLOCK_HEADS, False, READOUT,
        )  # fmt: skip
        ds = _score_gradient(k, q, w, inside, row_lse, delta, scale, UPCAST)
        grad_query = gradient_dot(tl.trans(k), ds, grad_query, UPCAST)
        values = gradient_dot(ds, q, tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype=tl.float32), UPCAST) * scale
        _store_key_gradient(grad_key, grad_key_strides, values, j, length, HEAD_DIM, BLOCK_DIM, ADD)
    _store_query_gradient(
        grad_query_partials, grad_query * scale, split, row, head, valid, num_rows, num_heads, HEAD_DIM, BLOCK_DIM
    )


@triton.jit(do_not_specialize=VARYING)
def query_gradients_kernel(
    query, key, lse, weights, deltas, entries, blocks, inverse, members, grad_query_partials,
    scale, length, num_rows, num_heads, group, num_columns,
    query_strides, key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, SET: tl.constexpr, READOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """∂q partials as in `gradients_kernel`, for blocks of any number of entries. Grid: splits, Hkv, blocks."""
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, first_key, end_key, _ = load_block(blocks, block)
    if first >= end:
        return
    _, begin, stop, _ = tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    columns = load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    row, _, key_start, key_end, _, valid = columns
    q, row_lse, delta, head, rows = _load_for_gradient(
        query, query_strides, lse, deltas, entries, columns, sequence, key_head * group, first, end,
        num_rows, num_heads, None, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
    )  # fmt: skip
    grad_query = tl.zeros([BLOCK_DIM, BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    for tile in range(begin, stop):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = load_key(key, key_strides, sequence, key_head, j, (j >= first_key) & (j < end_key), HEAD_DIM, BLOCK_DIM)
        inside = find_inside(j, key_start, key_end)
        w, inside = _load_weights(
            weights, inverse, members, columns, key_head * group, rows, j, inside,
            length, group, num_heads, num_columns, BLOCK_HEADS, SET, READOUT,
        )  # fmt: skip
        ds = _score_gradient(k, q, w, inside, row_lse, delta, scale, UPCAST)
        grad_query = gradient_dot(tl.trans(k), ds, grad_query, UPCAST)
    _store_query_gradient(
        grad_query_partials, grad_query * scale, split, row, head, valid, num_rows, num_heads, HEAD_DIM, BLOCK_DIM
    )


@triton.jit(do_not_specialize=VARYING)
def key_gradients_kernel(
    query, key, lse, weights, deltas, entries, blocks, inverse, members, grad_key,
    scale, length, num_rows, num_heads, group, num_columns,
    query_strides, key_strides, grad_key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, SET: tl.constexpr, ADD: tl.constexpr, READOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """∂k as in `gradients_kernel`, for any number of entries: the program of a tile walks over all of a sequence.

    With ADD, tiles that are in no row's reach are left alone.
    """
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, first_key, end_key, _ = load_block(blocks, block)
    first_tile, begin, stop, end_tile = tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    grad_key += sequence.to(tl.int64) * grad_key_strides[0] + tl.cast(key_head, tl.int64) * grad_key_strides[1]
    if not ADD:
        _zero_out_of_reach(
            grad_key, grad_key_strides, first_tile, begin, stop, end_tile, length, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS
        )
    for tile in range(begin, stop):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = load_key(key, key_strides, sequence, key_head, j, (j >= first_key) & (j < end_key), HEAD_DIM, BLOCK_DIM)
        values = tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype=tl.float32)
        reached = 0
        for entry in range(first, end, BLOCK_ROWS):
            columns = load_columns(entries, entry, end, group, BLOCK_ROWS, BLOCK_HEADS)
            inside = find_inside(j, columns[2], columns[3])  # their ranges
            # Packed neighbours, patches: most tiles are out of most rows' reach.
            if tl.max(tl.max(inside.to(tl.int32), axis=1), axis=0) > 0:
                q, row_lse, delta, head, rows = _load_for_gradient(
                    query, query_strides, lse, deltas, entries, columns, sequence, key_head * group, entry, end,
                    num_rows, num_heads, None, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
                )  # fmt: skip
                w, inside = _load_weights(
                    weights, inverse, members, columns, key_head * group, rows, j, inside,
                    length, group, num_heads, num_columns, BLOCK_HEADS, SET, READOUT,
                )  # fmt: skip
                ds = _score_gradient(k, q, w, inside, row_lse, delta, scale, UPCAST)
                values = gradient_dot(ds, q, values, UPCAST)
                reached += 1
        if ADD:
            if reached > 0:
                _store_key_gradient(grad_key, grad_key_strides, values * scale, j, length, HEAD_DIM, BLOCK_DIM, True)
        else:
            _store_key_gradient(grad_key, grad_key_strides, values * scale, j, length, HEAD_DIM, BLOCK_DIM, False)


@triton.jit(do_not_specialize=VARYING)
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
    table = entries + tl.cast(entry, tl.int64) * WIDTH
    if tl.load(table + IS_FIRST) == 0:
        return
    sequence, position = tl.load(table + SEQUENCE).to(tl.int64), tl.load(table + POSITION).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_DIM], dtype=tl.float32)
    while entry >= 0:
        table = entries + tl.cast(entry, tl.int64) * WIDTH
        row = tl.load(table + ROW).to(tl.int64)
        for start in range(0, num_splits, BLOCK_SPLITS):
            split = start + tl.arange(0, BLOCK_SPLITS)
            offset = ((tl.cast(split, tl.int64) * num_rows + row) * num_heads + head) * HEAD_DIM
            mask = (split < num_splits)[:, None] & (dim < HEAD_DIM)[None, :]
            total += tl.sum(tl.load(partials + offset[:, None] + dim[None, :], mask=mask, other=0.0), axis=0)
        entry = tl.load(table + NEXT)
    grad_query += sequence * grad_query_strides[0] + tl.cast(head, tl.int64) * grad_query_strides[1]
    grad_query += position * grad_query_strides[2] + dim.to(tl.int64) * grad_query_strides[3]
    if ADD:
        total += tl.load(grad_query, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(grad_query, total.to(grad_query.dtype.element_ty), mask=dim < HEAD_DIM)
