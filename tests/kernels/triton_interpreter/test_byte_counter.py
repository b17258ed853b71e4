"""The byte counter on kernels whose traffic is known."""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernels.byte_counter import count_bytes

pytestmark = pytest.mark.interpreter


@triton.jit
def _add_to_every_tile(x, bias, out, length, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + tl.arange(0, BLOCK))
    tl.store(out + offsets, values, mask=inside)


@triton.jit
def _count_up(x):
    tl.atomic_add(x, 1)


def _run(x, out, block=16):
    bias = torch.ones(block)
    _add_to_every_tile[triton.cdiv(len(x), block),](x, bias, out, len(x), BLOCK=block)


def test_issued_counts_every_unmasked_element_and_unique_every_address_once():
    x, out = torch.arange(37, dtype=torch.float16), torch.empty(37)
    with count_bytes() as traffic:
        _run(x, out)
    assert torch.equal(out, x + 1.0)
    counted = {(row.tensor, row.access): (row.issued, row.unique) for row in traffic.rows() if row.tensor != "out"}
    assert counted == {("x", "load"): (37 * 2, 37 * 2), ("bias", "load"): (3 * 16 * 4, 16 * 4)}
    assert traffic.total(kernel="_add_to_every_tile", tensor="out", access="store").issued == 37 * 4


def test_every_launch_counts_for_itself():
    x, out = torch.zeros(32), torch.empty(32)
    with count_bytes() as traffic:
        _run(x, out)
        _run(x, out)
    launches = {row.launch for row in traffic.rows() if row.tensor == "x"}
    assert len(launches) == 2
    assert traffic.total(tensor="x").unique == 2 * 32 * 4


def test_views_and_arguments_inside_one_buffer_are_told_apart():
    buffer = torch.zeros(4, 64)
    with count_bytes() as traffic:
        _run(buffer[0, 8:40], buffer[2, :32])
    assert traffic.total(tensor="x").unique == 32 * 4
    assert traffic.total(kernel="_add_to_every_tile", tensor="out").unique == 32 * 4


def test_torch_operations_are_counted_and_the_interpreters_own_are_not():
    with count_bytes() as traffic:
        x, out = torch.zeros(32), torch.empty(32)
        _run(x[:16], out[:16])
        copied = x.to(torch.float64)
    assert [(row.kernel, row.access, row.unique) for row in traffic.rows() if row.kernel.startswith("torch.")] == [
        ("torch.zeros", "store", 32 * 4),
        ("torch.ones", "store", 16 * 4),
        ("torch._to_copy", "load", 32 * 4),
        ("torch._to_copy", "store", copied.numel() * 8),
    ]


def test_nothing_is_counted_afterwards():
    with count_bytes() as traffic:
        pass
    _run(torch.zeros(16), torch.empty(16))
    assert traffic.rows() == []


def test_atomics_are_refused_rather_than_overlooked():
    with pytest.raises(Exception, match="atomic operations are not counted"), count_bytes():
        _count_up[1,](torch.zeros(1, dtype=torch.int32))
    _count_up[1,](torch.zeros(1, dtype=torch.int32))
