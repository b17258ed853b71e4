"""Noun attention, device code. Mathematics in `reference.py`, tiling in `kernels/README.md`.

    lse     lse_partials_kernel, lse_combine_kernel
    maps    maps_kernel                    a[r,n]    = (1/Hq) Σ_h exp(s[r,h,key of n] − lse[r,h])
    δ       delta_partials_kernel          δ[r,h]    = (1/Hq) Σ_n p[r,h,key of n] · ∂a[r,n]

READOUT is "mean", a map for all heads, or "each", a map [R, Hq, N] for each of them, without the 1/Hq.
"""

import triton
import triton.language as tl

from swim_kernels.attention_rows.triton.device import (
    VARYING,
    compute_probabilities,
    compute_scores,
    find_inside,
    load_block,
    load_columns,
    load_key,
    load_query,
    load_rows,
    own_tiles,
    per_head,
    tiles_in_reach,
)


@triton.jit(do_not_specialize=VARYING)
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
    sequence, first, end, first_key, end_key, key_set = load_block(blocks, block)
    if first >= end:
        return
    row, position, key_start, key_end, head, valid = load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    head += key_head * group
    q = load_query(query, query_strides, sequence, head, position, valid, HEAD_DIM, BLOCK_DIM)

    maximum = tl.full([BLOCK_ROWS * BLOCK_HEADS], -3.0e38, dtype=tl.float32)  # not −inf: −inf − (−inf) is NaN
    total = tl.zeros([BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    if SET:
        begin, stop = own_tiles(split, num_columns, BLOCK_KEYS)
    else:
        _, begin, stop, _ = tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    for tile in range(begin, stop):
        j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        if SET:
            n = j
            j = tl.load(key_sets + key_set.to(tl.int64) * num_columns + n, mask=n < num_columns, other=-1)
            column = tl.load(inverse + key_set.to(tl.int64) * length + j, mask=j >= 0, other=-1)
            counts = (j >= 0) & (column == n)  # a key that is named again counts once
            inside = find_inside(j, key_start, key_end) & counts[:, None]
        else:
            counts = (j >= first_key) & (j < end_key)
            inside = find_inside(j, key_start, key_end)
        k = load_key(key, key_strides, sequence, key_head, j, counts, HEAD_DIM, BLOCK_DIM)
        s = tl.where(inside, compute_scores(k, q, scale, UPCAST), float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(s, axis=0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(s - new_maximum[None, :]), axis=0)
        maximum = new_maximum
    offset = (tl.cast(split, tl.int64) * num_rows + row) * num_heads + head
    tl.store(maxima + offset, maximum, mask=valid)
    tl.store(sums + offset, total, mask=valid)


@triton.jit(do_not_specialize=VARYING)
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


@triton.jit(do_not_specialize=VARYING)
def maps_kernel(
    query, key, lse, entries, blocks, key_sets, maps,
    scale, num_rows, num_heads, num_key_heads, group, num_columns,
    query_strides, key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, READOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a [R, N], written once, or [R, Hq, N]. Grid: tiles of the key set, blocks of one sequence and key set."""
    tile, block = tl.program_id(0), tl.program_id(1)
    sequence, first, end, _, _, key_set = load_block(blocks, block)
    if first >= end:
        return
    n = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    j = tl.load(key_sets + key_set.to(tl.int64) * num_columns + n, mask=n < num_columns, other=-1)
    row, position, key_start, key_end, head, valid = load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    inside = find_inside(j, key_start, key_end)  # the padding −1 is in no range
    item = row.to(tl.int64) * num_heads + head
    lse += item
    acc = tl.zeros([BLOCK_KEYS, BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    for key_head in range(num_key_heads):
        first_head = key_head * group
        q = load_query(query, query_strides, sequence, first_head + head, position, valid, HEAD_DIM, BLOCK_DIM)
        k = load_key(key, key_strides, sequence, key_head, j, j >= 0, HEAD_DIM, BLOCK_DIM)
        p = compute_probabilities(k, q, inside, tl.load(lse + first_head, mask=valid, other=0.0), scale, UPCAST)
        if READOUT == "each":
            offset = (item + first_head)[None, :] * num_columns + n[:, None]
            tl.store(maps + offset, p, mask=valid[None, :] & (n < num_columns)[:, None])
        else:
            acc += p
    if READOUT == "mean":
        mean = tl.sum(tl.reshape(acc, [BLOCK_KEYS, BLOCK_ROWS, BLOCK_HEADS]), axis=2) / num_heads
        row, _, valid = load_rows(entries, first, end, BLOCK_ROWS)
        offset = row.to(tl.int64)[None, :] * num_columns + n[:, None]
        tl.store(maps + offset, mean, mask=valid[None, :] & (n < num_columns)[:, None])


@triton.jit(do_not_specialize=VARYING)
def delta_partials_kernel(
    query, key, lse, grad_maps, entries, blocks, key_sets, next_column, repeats, deltas, weights,
    scale, num_rows, num_heads, group, num_columns,
    query_strides, key_strides, grad_maps_stride,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, READOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ p · w over a split of the key set, [splits, R, Hq]. Grid: splits, Hkv, blocks of one key set.

    w is ∂a/Hq, for maps of each head ∂a. Only keys that are read out are loaded. The programs of the first key head,
    for maps of each head all, also write the weights [R, N] or [R, Hq, N]: Σ w over a column and the later ones that
    name the same key. The first column of a key so has the weight of the key. Rows of gradients and weights are
    `grad_maps_stride` and N apart, those of the heads of a row one after the other.
    """
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, _, _, key_set = load_block(blocks, block)
    if first >= end:
        return
    row, position, key_start, key_end, head, valid = load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    head += key_head * group
    q = load_query(query, query_strides, sequence, head, position, valid, HEAD_DIM, BLOCK_DIM)
    row_lse = tl.load(lse + row.to(tl.int64) * num_heads + head, mask=valid, other=0.0)
    if READOUT == "each":
        item, known, divisor = row * num_heads + head, valid, 1
    else:
        item, _, known = load_rows(entries, first, end, BLOCK_ROWS)
        divisor = num_heads
    grad_maps += item.to(tl.int64)[None, :] * grad_maps_stride
    key_sets += key_set.to(tl.int64) * num_columns

    delta = tl.zeros([BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
    begin, stop = own_tiles(split, num_columns, BLOCK_KEYS)
    for tile in range(begin, stop):
        n = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        j = tl.load(key_sets + n, mask=n < num_columns, other=-1)
        k = load_key(key, key_strides, sequence, key_head, j, j >= 0, HEAD_DIM, BLOCK_DIM)
        inside = find_inside(j, key_start, key_end)
        p = compute_probabilities(k, q, inside, row_lse, scale, UPCAST)
        w = tl.load(grad_maps + n[:, None], mask=(j >= 0)[:, None] & known[None, :], other=0.0) / divisor
        if READOUT == "mean":
            w = per_head(w, BLOCK_HEADS)
        delta += tl.sum(tl.where(inside, p * w, 0.0), axis=0)
    tl.store(deltas + (tl.cast(split, tl.int64) * num_rows + row) * num_heads + head, delta, mask=valid)

    if READOUT == "each" or key_head == 0:
        next_of_set = next_column + key_set.to(tl.int64) * num_columns
        weights_of_items = weights + item.to(tl.int64)[None, :] * num_columns
        times = tl.load(repeats) + 1
        for tile in range(begin, stop):
            n = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            column = tl.where(n < num_columns, n, -1)
            total = tl.zeros([BLOCK_KEYS, item.shape[0]], dtype=tl.float32)
            for _again in range(times):
                mask = (column >= 0)[:, None] & known[None, :]
                total += tl.load(grad_maps + column[:, None], mask=mask, other=0.0)
                column = tl.load(next_of_set + column, mask=column >= 0, other=-1)
            mask = (n < num_columns)[:, None] & known[None, :]
            tl.store(weights_of_items + n[:, None], total / divisor, mask=mask)
