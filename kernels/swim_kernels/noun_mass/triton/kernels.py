"""Noun mass, device code. Mathematics in `reference.py`, tiling in `kernels/README.md`.

    m    mass_partials_kernel, mass_combine_kernel    m[r,h,s] = Σ_{j in set s} exp(s[r,h,j] − lse[r,h])

The gradients are those of `attention_rows/triton/kernels.py`, with δ = Σ_s m · ∂m.
"""

import triton
import triton.language as tl

from swim_kernels.attention_rows.triton.device import (
    VARYING,
    compute_scores,
    find_inside,
    load_block,
    load_columns,
    load_key,
    load_query,
    tiles_in_reach,
)

_WORD = tl.constexpr(32)  # sets in a word of `members`


@triton.jit(do_not_specialize=VARYING)
def mass_partials_kernel(
    query, key, lse, entries, blocks, inverse, members, maxima, sums, parts,
    scale, length, num_rows, num_heads, group, num_sets, given,
    query_strides, key_strides,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, SET: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Over a split of the keys: maximum and Σ exp(s − maximum), [splits, R, Hq] each, and of the latter those of each
    set, [splits, R, Hq, S]. Grid: splits, Hkv, blocks of one key set.

    `members` [G, ⌈S / 32⌉, L] has a bit for every set that the key is in. The keys are passed over once for 32 sets.
    With lse `given`, it takes the place of the maximum, and only keys of the sets are loaded.
    """
    split, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, end, first_key, end_key, key_set = load_block(blocks, block)
    if first >= end:
        return
    row, position, key_start, key_end, head, valid = load_columns(entries, first, end, group, BLOCK_ROWS, BLOCK_HEADS)
    head += key_head * group
    q = load_query(query, query_strides, sequence, head, position, valid, HEAD_DIM, BLOCK_DIM)
    own = row.to(tl.int64) * num_heads + head
    offset = tl.cast(split, tl.int64) * num_rows * num_heads + own
    least = tl.maximum(tl.load(lse + own, mask=valid & (given != 0), other=-3.0e38), -3.0e38)  # −inf − (−inf) is NaN
    _, begin, stop, _ = tiles_in_reach(split, first_key, end_key, length, BLOCK_KEYS)
    words = members + key_set.to(tl.int64) * tl.cdiv(num_sets, _WORD) * length
    inverse += key_set.to(tl.int64) * length
    bit = tl.arange(0, _WORD)
    for first_set in range(0, num_sets, _WORD):
        num_bits = tl.minimum(num_sets - first_set, _WORD)
        maximum = least
        total = tl.zeros([BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
        part = tl.zeros([_WORD, BLOCK_ROWS * BLOCK_HEADS], dtype=tl.float32)
        for tile in range(begin, stop):
            j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            counts = (j >= first_key) & (j < end_key)
            word = tl.load(words + j, mask=counts, other=0)
            inside = find_inside(j, key_start, key_end)
            if SET:
                counts = counts & (tl.load(inverse + j, mask=counts, other=-1) >= 0)
                inside = inside & counts[:, None]
            counts = counts & ((given == 0) | (word != 0))
            k = load_key(key, key_strides, sequence, key_head, j, counts, HEAD_DIM, BLOCK_DIM)
            s = tl.where(inside, compute_scores(k, q, scale, UPCAST), float("-inf"))
            new_maximum = tl.where(given != 0, maximum, tl.maximum(maximum, tl.max(s, axis=0)))
            shares = tl.where(inside, tl.exp(s - new_maximum[None, :]), 0.0)
            decay = tl.where(given != 0, 1.0, tl.exp(maximum - new_maximum))
            total = total * decay + tl.sum(shares, axis=0)
            part = part * decay[None, :]
            for index in range(num_bits):
                chosen = ((word >> index) & 1) != 0
                of_set = tl.sum(tl.where(chosen[:, None], shares, 0.0), axis=0)
                part += tl.where((bit == index)[:, None], of_set[None, :], 0.0)
            maximum = new_maximum
        if first_set == 0:
            tl.store(maxima + offset, maximum, mask=valid)
            tl.store(sums + offset, total, mask=valid)
        target = parts + offset[None, :] * num_sets + first_set + bit[:, None]
        tl.store(target, part, mask=(bit < num_bits)[:, None] & valid[None, :])
        words += length


@triton.jit(do_not_specialize=VARYING)
def mass_combine_kernel(
    maxima, sums, parts, lse, masses, num_items, num_splits, num_sets, given, BLOCK: tl.constexpr
):  # fmt: skip
    """m [R · Hq, S] of the partials, and lse [R · Hq] unless it is given; 0 where the softmax has no key.

    Grid: R · Hq / BLOCK.
    """
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = item < num_items
    maximum = tl.full([BLOCK], -3.0e38, dtype=tl.float32)
    for split in range(num_splits):
        maximum = tl.maximum(
            maximum, tl.load(maxima + tl.cast(split, tl.int64) * num_items + item, mask=valid, other=-3.0e38)
        )
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(num_splits):
        offset = tl.cast(split, tl.int64) * num_items + item
        decay = tl.exp(tl.load(maxima + offset, mask=valid, other=-3.0e38) - maximum)
        total += tl.load(sums + offset, mask=valid, other=0.0) * decay
    total = tl.where(given != 0, 1.0, total)
    found = total > 0
    if given == 0:
        tl.store(lse + item, tl.where(found, maximum + tl.log(tl.where(found, total, 1.0)), 0.0), mask=valid)
    for index in range(num_sets):
        part = tl.zeros([BLOCK], dtype=tl.float32)
        for split in range(num_splits):
            offset = tl.cast(split, tl.int64) * num_items + item
            decay = tl.exp(tl.load(maxima + offset, mask=valid, other=-3.0e38) - maximum)
            part += tl.load(parts + offset * num_sets + index, mask=valid, other=0.0) * decay
        tl.store(masses + item * num_sets + index, tl.where(found, part / tl.where(found, total, 1.0), 0.0), mask=valid)
