"""How many programs the kernels of noun attention are launched with on an H100, of 132 multiprocessors."""

import re

import pytest

from swim_kernels import noun_attention
from tests.helpers.pretend_gpu import record
from tests.pretend_gpu.kernel_batches import HEADS, KEY_HEADS, Batches, forget_builds

PROCESSORS, GROUP = 132, HEADS // KEY_HEADS
SIZES = [(length, rows) for length in (16384, 65536, 131072) for rows in (4, 8, 64)]


def measure_grids(length, num_rows, num_columns=None):
    batches = Batches(fused=False, over="range")
    query, key = (batches.make_input(heads, length, 1) for heads in (HEADS, KEY_HEADS))
    queries = batches.make_queries(num_rows, length, 1, 1, num_columns or length - 100)
    with record() as seen:
        noun_attention(query, key, queries).sum().backward()
    names = [re.match(r"triton (\w+)_kernel (\d+)x(\d+)x(\d+)", event.name) for event in seen.of("launch")]
    return {match[1]: tuple(map(int, match.groups()[1:])) for match in names if match}


@pytest.mark.parametrize("length, num_rows", SIZES)
def test_every_pass_over_the_keys_fills_the_gpu(length, num_rows):
    """Two programs for each multiprocessor, as nearly as heads and blocks of rows divide them.

    One where more partials of ∂q would cost more than a few per cent of K's bytes.
    """
    forget_builds()
    programs = {name: x * y * z for name, (x, y, z) in measure_grids(length, num_rows).items()}
    gradients = "query_gradients" if num_rows == 64 else "gradients"
    for name in {"lse_partials", "delta_partials", "key_gradients"} & set(programs):
        assert programs[name] >= 1.9 * PROCESSORS, name
    keys = length * KEY_HEADS * -(-num_rows // 8) / programs[gradients]  # of a split
    partials = 2 * 4 * min(num_rows, 8) * GROUP / (2 * keys)  # bytes, as a part of K's
    if programs[gradients] >= 1.9 * PROCESSORS:
        assert partials <= 1 / 16
    else:
        assert 0.9 * PROCESSORS <= programs[gradients] <= PROCESSORS and 2 * partials > 1 / 16


def test_grids_follow_from_shapes():
    assert measure_grids(5000, 5, 3000) == measure_grids(5000, 5, 3000)
