"""Grid prediction and metrics, device code. Mathematics in `reference.py`, the gradient in `torch_backend.py`.

             "probability"             "min_max"
    p        fusion_kernel             prediction_kernel
    ∂maps    fusion_gradient_kernel    gradient_kernel
    metrics                            metrics_kernel

One program does one patch (of one layer, for fusion "none"), block by block, for "min_max" in several passes over its
cells; the layers' maps come as a tuple of pointers. log f is computed once, into the patch's part of the output, and
read back from there: every pass sees the same bits of it, so that the cells at the minimum and maximum are found again.
No atomics; every element of every output is written by exactly one program.

A *term* is what one logarithm is taken of: log f is the sum over terms, which are the layers ("product"), one layer
("none") or the mean of all of them ("mean").

The table of the pairs (`GridPairs.table`): row of the maps, first column, height, width, first cell, mask, 0, 0. The
maps have the same strides, which are no tuples: the row stride is a length. Offsets are int64.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(2.0**-103)  # finfo.tiny / finfo.eps of fp32: the least attention that counts as it is

# Numbers that differ from video to video: not to be compiled in, and no new build where one happens to be 1 or 16 · n.
_NUMBERS = ["row_stride", "num_cells", "out_layer_stride", "out_row_stride"]
_NUMBERS += "table p grad_p grad_maps shares centres log_f metrics".split()  # nor where an address is 16 · n


@triton.jit
def _expm1(x):
    """e^x − 1 for x ≤ 0 with all its digits: by Taylor's series down to −1, where 11 terms are enough."""
    series = 1.0 + x * (1.0 / 11)
    series = 1.0 + x * (1.0 / 10) * series
    series = 1.0 + x * (1.0 / 9) * series
    series = 1.0 + x * (1.0 / 8) * series
    series = 1.0 + x * (1.0 / 7) * series
    series = 1.0 + x * (1.0 / 6) * series
    series = 1.0 + x * (1.0 / 5) * series
    series = 1.0 + x * (1.0 / 4) * series
    series = 1.0 + x * (1.0 / 3) * series
    series = 1.0 + x * (1.0 / 2) * series
    return tl.where(x > -1.0, x * series, tl.exp(x) - 1.0)


@triton.jit
def _patch(table, row_stride, column_stride, num_cells):
    """Return of the program's pair the row, first column and first cell, and of its patch the number of cells and where
    it begins in the maps and among the p."""
    table += tl.cast(tl.program_id(0), tl.int64) * 8
    size = tl.load(table + 2) * tl.load(table + 3)
    row, start = tl.load(table).to(tl.int64), tl.load(table + 1).to(tl.int64)
    first_cell = tl.load(table + 4).to(tl.int64)
    first_p = tl.cast(tl.program_id(1), tl.int64) * num_cells + first_cell
    return (row, start, first_cell), size, row * row_stride + start * column_stride, first_p


@triton.jit
def _first_gradient(pair, out_row_stride, DENSE: tl.constexpr):
    """Return where a patch begins in the gradient of the first layer's map."""
    row, start, first_cell = pair
    if DENSE:
        return row * out_row_stride + start
    else:
        return first_cell


@triton.jit
def _terms(maps, MEAN: tl.constexpr, SEPARATE: tl.constexpr):
    """First and end term of the program."""
    if SEPARATE:
        return tl.program_id(1), tl.program_id(1) + 1
    elif MEAN:
        return 0, 1
    else:
        return 0, len(maps)


@triton.jit
def _load_layer(maps, layer, offset, mask):
    """[BLOCK] of one layer; 0 where masked."""
    pointer = maps[0]
    for index in tl.static_range(1, len(maps)):
        pointer = tl.where(layer == index, maps[index], pointer)
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def _load_term(maps, term, offset, mask, MEAN: tl.constexpr):
    """[BLOCK] attention before the floor; 0 where masked."""
    if MEAN:
        total = _load_layer(maps, 0, offset, mask)
        for layer in range(1, len(maps)):
            total += _load_layer(maps, layer, offset, mask)
        return tl.div_rn(total, 1.0 * len(maps))
    else:
        return _load_layer(maps, term, offset, mask)


@triton.jit
def _store_log_f(
    maps, first, end, frame, column_stride, size, log_f,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes log f of a frame, up to a constant, to log_f [size]; returns min and max of it, NaN if any cell is NaN.

    frame: offset of its first cell in the maps.
    """
    for term in range(first, end):
        # log of a ratio near 1 keeps the digits that log a − log max would lose; at the maximum it is exactly 0
        high = tl.full([BLOCK], FLOOR, tl.float32)
        for begin in range(0, size, BLOCK):
            cell = begin + tl.arange(0, BLOCK)
            a = _load_term(maps, term, frame + cell.to(tl.int64) * column_stride, cell < size, MEAN)
            high = tl.maximum(high, a)
        maximum = tl.max(high, axis=0)
        for begin in range(0, size, BLOCK):
            cell = begin + tl.arange(0, BLOCK)
            mask = cell < size
            a = _load_term(maps, term, frame + cell.to(tl.int64) * column_stride, mask, MEAN)
            a = tl.where(a < FLOOR, FLOOR, a)  # tl.maximum would hide NaN
            before = tl.load(log_f + cell, mask=mask & (term > first), other=0.0)
            tl.store(log_f + cell, before + tl.log(tl.div_rn(a, maximum)), mask=mask)
        tl.debug_barrier()  # what is read back may have been written by another thread

    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], -float("inf"), tl.float32)
    wrong = tl.full([BLOCK], 0, tl.int32)
    for begin in range(0, size, BLOCK):
        cell = begin + tl.arange(0, BLOCK)
        mask = cell < size
        values = tl.load(log_f + cell, mask=mask, other=0.0)
        low = tl.minimum(low, tl.where(mask, values, float("inf")))
        high = tl.maximum(high, tl.where(mask, values, -float("inf")))
        wrong = tl.maximum(wrong, (values != values).to(tl.int32))
    nan = tl.where(tl.max(wrong, axis=0) > 0, float("nan"), 0.0)
    return tl.min(low, axis=0) + nan, tl.max(high, axis=0) + nan


@triton.jit
def _load_log_f(log_f, cell, mask, high):
    """[BLOCK]; where masked the frame's maximum, so that nothing overflows there."""
    return tl.where(mask, tl.load(log_f + cell, mask=mask, other=0.0), high)


@triton.jit
def _spread(low, high):
    """1 − m; 1 on a constant frame, where nothing lies between the extremes."""
    spread = -_expm1(low - high)
    return tl.where(spread == 0.0, 1.0, spread)


@triton.jit
def _min_max(log_f, low, high, spread):
    """p = F (1 − exp(low − log f)) / (1 − m), exactly 1 at the maximum, 0 at the minimum."""
    p = tl.exp(log_f - high) * -_expm1(low - log_f) / spread
    p = tl.where(log_f == high, 1.0, p)
    return tl.where(log_f == low, 0.0, p)


@triton.jit(do_not_specialize=_NUMBERS)
def fusion_kernel(
    table, maps, p,
    row_stride, column_stride, num_cells,
    FUSION: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p = f, "add" at most 1. Grid: P, 1 or layers."""
    _, size, frame, first_p = _patch(table, row_stride, column_stride, num_cells)
    first, end = _terms(maps, False, SEPARATE)
    p += first_p
    for begin in range(0, size, BLOCK):
        cell = begin + tl.arange(0, BLOCK)
        mask = cell < size
        offset = frame + cell.to(tl.int64) * column_stride
        values = _load_layer(maps, first, offset, mask)
        for layer in range(first + 1, end):
            if FUSION == "product":
                values *= _load_layer(maps, layer, offset, mask)
            else:
                values += _load_layer(maps, layer, offset, mask)
        if FUSION == "mean":
            values = tl.div_rn(values, 1.0 * len(maps))
        elif FUSION == "add":
            values = tl.where(values > 1.0, 1.0, values)  # tl.minimum would hide NaN
        tl.store(p + cell, values, mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def fusion_gradient_kernel(
    table, maps, grad_p, grad_maps,
    row_stride, column_stride, num_cells, out_layer_stride, out_row_stride,
    FUSION: tl.constexpr, SEPARATE: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂a of every layer on one patch, to maps [layers, R, N] (DENSE) or cells [layers, M]. Grid: P, 1 or layers."""
    pair, size, frame, first_p = _patch(table, row_stride, column_stride, num_cells)
    first, end = _terms(maps, False, SEPARATE)
    grad_p += first_p
    grad_maps += _first_gradient(pair, out_row_stride, DENSE)
    for begin in range(0, size, BLOCK):
        cell = begin + tl.arange(0, BLOCK)
        mask = cell < size
        offset = frame + cell.to(tl.int64) * column_stride
        grad = tl.load(grad_p + cell, mask=mask, other=0.0)
        if FUSION == "mean":
            grad = tl.div_rn(grad, 1.0 * len(maps))
        elif FUSION == "add":
            total = _load_layer(maps, 0, offset, mask)
            for layer in range(1, len(maps)):
                total += _load_layer(maps, layer, offset, mask)
            grad = tl.where(total > 1.0, 0.0, grad)
        for layer in range(first, end):
            values = grad
            if FUSION == "product":
                for other in range(first, end):
                    a = _load_layer(maps, other, offset, mask)
                    values *= tl.where(other == layer, 1.0, a)
            tl.store(grad_maps + tl.cast(layer, tl.int64) * out_layer_stride + cell, values, mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def prediction_kernel(
    table, maps, p,
    row_stride, column_stride, num_cells,
    MEAN: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p of "min_max". Grid: P, 1 or layers."""
    _, size, frame, first_p = _patch(table, row_stride, column_stride, num_cells)
    first, end = _terms(maps, MEAN, SEPARATE)
    p += first_p
    low, high = _store_log_f(maps, first, end, frame, column_stride, size, p, MEAN, BLOCK)
    spread = _spread(low, high)
    for begin in range(0, size, BLOCK):
        cell = begin + tl.arange(0, BLOCK)
        mask = cell < size
        log_f = _load_log_f(p, cell, mask, high)
        tl.store(p + cell, _min_max(log_f, low, high, spread), mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def gradient_kernel(
    table, maps, grad_p, grad_maps,
    row_stride, column_stride, num_cells, out_layer_stride, out_row_stride,
    MEAN: tl.constexpr, SEPARATE: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂a of every layer on one frame, to maps [layers, R, N] (DENSE) or cells [layers, M]. Grid: P, 1 or layers.

        ∂log f = G F / (1 − m), at the minimum −(Σ G (1 − p)) m / (1 − m), at the maximum −(Σ G p) / (1 − m)
        ∂a     = ∂log f / a

    with G = 0 at the extremes, whose shares are divided evenly among the cells there.
    """
    pair, size, frame, first_p = _patch(table, row_stride, column_stride, num_cells)
    first, end = _terms(maps, MEAN, SEPARATE)
    grad_p += first_p
    grad_maps += _first_gradient(pair, out_row_stride, DENSE)
    scratch = grad_maps + tl.cast(first, tl.int64) * out_layer_stride  # of log f, until the gradient takes its place
    low, high = _store_log_f(maps, first, end, frame, column_stride, size, scratch, MEAN, BLOCK)
    spread = _spread(low, high)

    to_low = tl.full([BLOCK], 0.0, tl.float32)
    to_high = tl.full([BLOCK], 0.0, tl.float32)
    num_low = tl.full([BLOCK], 0.0, tl.float32)
    num_high = tl.full([BLOCK], 0.0, tl.float32)
    for begin in range(0, size, BLOCK):
        cell = begin + tl.arange(0, BLOCK)
        mask = cell < size
        log_f = _load_log_f(scratch, cell, mask, high)
        is_low, is_high = log_f == low, log_f == high
        extreme = is_low | is_high
        grad = tl.load(grad_p + cell, mask=mask, other=0.0)
        p = tl.exp(log_f - high) * -_expm1(low - log_f) / spread
        to_low += tl.where(extreme, 0.0, grad * (-_expm1(log_f - high) / spread))
        to_high += tl.where(extreme, 0.0, grad * p)
        num_low += (is_low & mask).to(tl.float32)
        num_high += (is_high & mask).to(tl.float32)
    at_low = -tl.sum(to_low, axis=0) * tl.exp(low - high) / spread / tl.sum(num_low, axis=0)
    at_high = -tl.sum(to_high, axis=0) / spread / tl.sum(num_high, axis=0)

    for begin in range(0, size, BLOCK):
        cell = begin + tl.arange(0, BLOCK)
        mask = cell < size
        log_f = _load_log_f(scratch, cell, mask, high)
        grad = tl.load(grad_p + cell, mask=mask, other=0.0) * tl.exp(log_f - high) / spread
        grad = tl.where(log_f == low, at_low, grad)
        grad = tl.where(log_f == high, at_high, grad)
        for term in range(first, end):
            a = _load_term(maps, term, frame + cell.to(tl.int64) * column_stride, mask, MEAN)
            counts = a >= FLOOR
            values = tl.where(counts, tl.div_rn(grad, tl.where(counts, a, 1.0)), 0.0)
            if MEAN:
                for layer in range(0, len(maps)):
                    out = grad_maps + tl.cast(layer, tl.int64) * out_layer_stride
                    tl.store(out + cell, values / len(maps), mask=mask)
            else:
                out = grad_maps + tl.cast(term, tl.int64) * out_layer_stride
                tl.store(out + cell, values, mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def metrics_kernel(
    table, maps, shares, centres, log_f, metrics,
    row_stride, column_stride, num_cells,
    MEAN: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(hit, mass, iou, 1) of one patch, zeros where Σ m = 0; log_f is scratch. Grid: P, 1 or layers.

    hit = Σ_(log f = high) z / their number    mass = Σ m F / Σ F    iou = Σ p m / Σ (p + m − p m)
    """
    pair, size, frame, first_p = _patch(table, row_stride, column_stride, num_cells)
    first, end = _terms(maps, MEAN, SEPARATE)
    log_f += first_p
    shares += pair[2]
    centres += pair[2]
    low, high = _store_log_f(maps, first, end, frame, column_stride, size, log_f, MEAN, BLOCK)
    spread = _spread(low, high)

    zero = tl.full([BLOCK], 0.0, tl.float32)
    hits, num_high, sum_f, inside, common, union, area = zero, zero, zero, zero, zero, zero, zero
    for begin in range(0, size, BLOCK):
        cell = begin + tl.arange(0, BLOCK)
        mask = cell < size
        values = _load_log_f(log_f, cell, mask, high)
        share = tl.load(shares + cell, mask=mask, other=0.0)
        centre = tl.load(centres + cell, mask=mask, other=0.0)
        f = tl.where(mask, tl.exp(values - high), 0.0)
        p = tl.where(mask, _min_max(values, low, high, spread), 0.0)
        is_high = ((values == high) & mask).to(tl.float32)
        hits += is_high * centre
        num_high += is_high
        sum_f += f
        inside += share * f
        common += share * p
        union += p + share - share * p
        area += share
    some = tl.sum(area, axis=0) > 0.0
    metrics += (tl.cast(tl.program_id(1), tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 4
    # a NaN leaves no cell at the maximum: 0 / 0
    tl.store(metrics, tl.where(some, tl.div_rn(tl.sum(hits, axis=0), tl.sum(num_high, axis=0)), 0.0))
    tl.store(metrics + 1, tl.where(some, tl.div_rn(tl.sum(inside, axis=0), tl.sum(sum_f, axis=0)), 0.0))
    divisor = tl.where(some, tl.sum(union, axis=0), 1.0)  # 0 on a constant patch with an empty mask
    tl.store(metrics + 2, tl.where(some, tl.div_rn(tl.sum(common, axis=0), divisor), 0.0))
    tl.store(metrics + 3, some.to(tl.float32))
