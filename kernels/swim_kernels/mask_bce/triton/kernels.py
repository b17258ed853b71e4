"""Mask BCE, device code. Mathematics in `reference.py`, the bands in `kernels/README.md`.

    bands_kernel     of every cell, over the pixels whose interpolation starts there: the loss, and the four sums of
                     slope times weight
    combine_kernel   the sums that meet at a cell, and the losses of a pair's cells, over the number of pixels

A *band* are the pixel rows (columns) whose interpolation starts at one cell row (column). No upsampled prediction in
memory, no atomics; every element of every output is written by exactly one program.

    table       [P, 8] int32   of `GridPairs`: ., ., height, width, first cell, mask, 0, 0
    mask_table  [K, 4] int64   of `PackedMasks`: first byte, bytes of a row, height, width
    partials    [1 or 5, sets, M]  of every cell (i, j): Σ loss; Σ slope · weight of (i, j), (i, j + 1), (i + 1, j),
                                   (i + 1, j + 1)

Offsets are int64.
"""

import triton
import triton.language as tl

MARGIN = tl.constexpr(1e-6)

# Numbers that differ from video to video: not to be compiled in, and no new build where one happens to be 1 or 16 · n.
_NUMBERS = ["num_cells", "num_sets", "num_masks"]
_NUMBERS += ["cells", "table", "bits", "mask_table", "partials", "losses", "gradient"]  # nor where an address is 16 · n


@triton.jit
def _pair(table):
    """height, width, first cell, mask of the program's pair"""
    table += tl.cast(tl.program_id(0), tl.int64) * 8
    return tl.load(table + 2), tl.load(table + 3), tl.load(table + 4).to(tl.int64), tl.load(table + 5)


@triton.jit
def _mask(mask_table, number, num_masks):
    """first byte, bytes of a row, height, width of a mask"""
    number = tl.minimum(tl.maximum(number, 0), num_masks - 1)  # a wrong one must not lead to wild memory access
    mask_table += number.to(tl.int64) * 4
    return tl.load(mask_table), tl.load(mask_table + 1), tl.load(mask_table + 2), tl.load(mask_table + 3)


@triton.jit
def _band_start(band, cells, pixels):
    """The first pixel of a band, int32; that of the band after the last is the number of pixels.

    Pixel y lies at ((2 y + 1) · cells - pixels) / (2 · pixels) cells; what lies before the first cell belongs to it.
    """
    start = ((2 * tl.cast(band, tl.int64) + 1) * pixels + cells - 1) // (2 * cells)
    return tl.where(band >= cells, pixels, tl.where(band > 0, start, 0)).to(tl.int32)


@triton.jit
def _after(pixel, band, cells, pixels):
    """The weight of the cell after the band's, fp32: exact integers, one division."""
    place = (2 * tl.cast(pixel, tl.int64) + 1) * cells - (2 * tl.cast(band, tl.int64) + 1) * pixels
    place = tl.maximum(place, 0).to(tl.float32)  # before the first cell: the first cell
    return tl.div_rn(place, tl.zeros_like(place) + (2 * pixels).to(tl.float32))


@triton.jit(do_not_specialize=_NUMBERS)
def bands_kernel(
    cells, table, bits, mask_table, partials,
    num_cells, num_sets, num_masks,
    WANT_GRADIENT: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The partials of COLUMNS cells of one row. Grid: P, highest grid, blocks of the widest grid × sets.

    A tile has the columns in its first dimension and PIXELS pixels of each one's band in the second. The cells are
    interpolated in x once for it; then it walks down the band of rows.
    """
    height, width, first_cell, number = _pair(table)
    row = tl.program_id(1)
    block, part = tl.program_id(2) // num_sets, tl.program_id(2) % num_sets
    if (row >= height) | (block * COLUMNS >= width):
        return
    first_byte, row_bytes, mask_height, mask_width = _mask(mask_table, number, num_masks)
    bits += first_byte

    column = block * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < width
    cells += tl.cast(part, tl.int64) * num_cells + first_cell
    next_row = tl.minimum(row + 1, height - 1)
    next_column = tl.minimum(column + 1, width - 1)
    c00 = tl.load(cells + row * width + column, mask=valid, other=0.0)[:, None]
    c01 = tl.load(cells + row * width + next_column, mask=valid, other=0.0)[:, None]
    c10 = tl.load(cells + next_row * width + column, mask=valid, other=0.0)[:, None]
    c11 = tl.load(cells + next_row * width + next_column, mask=valid, other=0.0)[:, None]

    start = _band_start(column, width, mask_width)
    end = tl.where(valid, _band_start(column + 1, width, mask_width), start)
    first_y = _band_start(row, height, mask_height)
    end_y = _band_start(row + 1, height, mask_height)

    # [COLUMNS, PIXELS]
    loss = tl.zeros([COLUMNS, PIXELS], dtype=tl.float32)
    g00 = tl.zeros([COLUMNS, PIXELS], dtype=tl.float32)
    g01 = tl.zeros([COLUMNS, PIXELS], dtype=tl.float32)
    g10 = tl.zeros([COLUMNS, PIXELS], dtype=tl.float32)
    g11 = tl.zeros([COLUMNS, PIXELS], dtype=tl.float32)
    for offset in range(0, tl.max(end - start, axis=0), PIXELS):
        x = start[:, None] + offset + tl.arange(0, PIXELS)[None, :]
        inside = x < end[:, None]
        right = tl.where(inside, _after(x, column[:, None], width, mask_width), 0.0)
        upper = c00 * (1.0 - right) + c01 * right
        lower = c10 * (1.0 - right) + c11 * right
        chunk_loss = tl.zeros([COLUMNS, PIXELS], dtype=tl.float32)
        above = tl.zeros([COLUMNS, PIXELS], dtype=tl.float32)
        below = tl.zeros([COLUMNS, PIXELS], dtype=tl.float32)
        for y in range(first_y, end_y):
            down = _after(y, row, height, mask_height)
            p = upper * (1.0 - down) + lower * down
            byte = tl.load(bits + y * row_bytes + (x >> 3), mask=inside, other=0)
            is_set = ((byte.to(tl.int32) >> (x & 7)) & 1) == 1
            argument = MARGIN + (1 - 2 * MARGIN) * tl.where(is_set, p, 1.0 - p)
            slope = tl.where(is_set, 2 * MARGIN - 1, 1 - 2 * MARGIN) / argument
            chunk_loss -= tl.log(argument)
            if WANT_GRADIENT:
                above += (1.0 - down) * slope
                below += down * slope
        # what lies behind a band is somebody else's
        loss += tl.where(inside, chunk_loss, 0.0)
        if WANT_GRADIENT:
            above = tl.where(inside, above, 0.0)
            below = tl.where(inside, below, 0.0)
            g00 += (1.0 - right) * above
            g01 += right * above
            g10 += (1.0 - right) * below
            g11 += right * below

    plane = tl.cast(num_sets, tl.int64) * num_cells
    partials += tl.cast(part, tl.int64) * num_cells + first_cell + row * width + column
    tl.store(partials, tl.sum(loss, axis=1), mask=valid)
    if WANT_GRADIENT:
        tl.store(partials + plane, tl.sum(g00, axis=1), mask=valid)
        tl.store(partials + 2 * plane, tl.sum(g01, axis=1), mask=valid)
        tl.store(partials + 3 * plane, tl.sum(g10, axis=1), mask=valid)
        tl.store(partials + 4 * plane, tl.sum(g11, axis=1), mask=valid)


@triton.jit(do_not_specialize=_NUMBERS)
def combine_kernel(
    partials, table, mask_table, losses, gradient,
    num_cells, num_sets, num_masks,
    WANT_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses [sets, P] and d loss / d cell [sets, M]. Grid: P, sets.

        d loss / d c(i, j) = (g00(i, j) + g01(i, j - 1) + g10(i - 1, j) + g11(i - 1, j - 1)) / (H W)

    In the last row, where there is no row below, g10 and g11 fall on the row itself; the same in x.
    """
    height, width, first_cell, number = _pair(table)
    _, _, mask_height, mask_width = _mask(mask_table, number, num_masks)
    pixels = (mask_height * mask_width).to(tl.float32)
    part = tl.cast(tl.program_id(1), tl.int64)
    plane = tl.cast(num_sets, tl.int64) * num_cells
    partials += part * num_cells + first_cell
    loss = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, height * width, BLOCK):
        cell = first + tl.arange(0, BLOCK)
        mask = cell < height * width
        loss += tl.load(partials + cell, mask=mask, other=0.0)
        if WANT_GRADIENT:
            row, column = cell // width, cell % width
            inner_row, inner_column = mask & (row > 0), mask & (column > 0)
            last_row, last_column = mask & (row == height - 1), mask & (column == width - 1)
            g01, g10, g11 = partials + 2 * plane, partials + 3 * plane, partials + 4 * plane
            total = tl.load(partials + plane + cell, mask=mask, other=0.0)
            total += tl.load(g01 + cell - 1, mask=inner_column, other=0.0)
            total += tl.load(g01 + cell, mask=last_column, other=0.0)
            total += tl.load(g10 + cell - width, mask=inner_row, other=0.0)
            total += tl.load(g10 + cell, mask=last_row, other=0.0)
            total += tl.load(g11 + cell - width - 1, mask=inner_row & inner_column, other=0.0)
            total += tl.load(g11 + cell - width, mask=inner_row & last_column, other=0.0)
            total += tl.load(g11 + cell - 1, mask=last_row & inner_column, other=0.0)
            total += tl.load(g11 + cell, mask=last_row & last_column, other=0.0)
            tl.store(
                gradient + part * num_cells + first_cell + cell,
                tl.div_rn(total, tl.zeros_like(total) + pixels),
                mask=mask,
            )
    pair = tl.program_id(0)
    tl.store(losses + part * tl.num_programs(0) + pair, tl.sum(loss, axis=0) / pixels)
