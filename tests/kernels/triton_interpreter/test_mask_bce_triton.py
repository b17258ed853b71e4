"""Mask BCE in Triton against float64, values and gradients; its launches and what they load and store."""

from __future__ import annotations

import importlib
import math
import random

import pytest
import torch

from benchmarks.kernels.byte_counter import count_bytes
from swim_kernels.mask_bce import mask_bce
from swim_kernels.structs import packed_masks
from swim_kernels.structs.packed_masks import PackedMasks
from tests.kernels import device
from tests.kernels.device import on_device
from tests.kernels.mask_bce_cases import CASES, formulas, make_inputs, make_masks, make_pairs, run
from tests.kernels.test_mask_bce import (
    MANY,
    assert_right_and_wrong,
    assert_small_losses_keep_their_digits,
    assert_within_budget,
    one_thread,  # noqa: F401
)

backend = importlib.import_module("swim_kernels.mask_bce.triton.launch")

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread"),
    # log 0, and what is computed for pixels that are nobody's and thrown away
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def sample(inputs):
    """(triton, eager, exact)"""
    eager, actual = (run(*inputs, backend=name) for name in ("eager", "triton"))
    return actual, eager, formulas(*inputs)


def random_inputs(grids, sizes, numbers, num_sets=1):
    pairs, masks = make_pairs(grids, numbers), make_masks(sizes)
    generator = torch.Generator().manual_seed(0)
    cells = (torch.rand(num_sets, pairs.num_cells, generator=generator) * 1.5 - 0.25).clamp(0, 1)
    return cells, pairs, masks, torch.randn(num_sets, len(pairs), generator=generator)


@pytest.mark.parametrize(
    "case, dtype",
    [*((case, torch.float32) for case in CASES), ("one pair", torch.bfloat16), ("one row, one column", torch.float16)],
)
def test_against_float64(case, dtype):
    layouts = ("contiguous", "transposed", "sliced")
    samples = [
        sample(make_inputs(case, dtype, num_sets=seed + 1, seed=seed, layout=layout, saturated=seed != 1))
        for seed, layout in enumerate(layouts)
    ]
    assert_within_budget(samples)


def test_several_blocks_of_columns_and_chunks_of_pixels():
    """Bands of 1 to 60 pixels; more cells than a block of the kernel that combines."""
    grids = [(2, 3), (3, 2 * backend.COLUMNS + 3), (17, 16), (1, backend.COLUMNS)]
    sizes = [(9, 2 * backend.PIXELS * 4 + 5), (8, 7 * backend.PIXELS), (19, 18)]
    assert 17 * 16 > backend.COMBINE_BLOCK
    assert_within_budget([sample(random_inputs(grids, sizes, [0, 1, 2, 0], num_sets=2))])


def test_bands_of_any_two_sizes():
    chosen = random.Random(0)
    grids = [(chosen.randint(1, 9), chosen.randint(1, 9)) for _ in range(40)]
    sizes = [(chosen.randint(1, 25), chosen.randint(1, 25)) for _ in range(40)]
    actual, eager, exact = sample(random_inputs(grids, sizes, list(range(40))))
    assert_within_budget([(actual, eager, exact)])
    # each pair for itself: an error in a small one must not hide behind the others
    torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-5, atol=1e-6)


def test_small_losses_keep_their_digits():
    assert_small_losses_keep_their_digits("triton")


def test_predictions_that_are_all_right_or_all_wrong():
    assert_right_and_wrong("triton", torch.float32)


def test_nan_stays_in_its_pair():
    cells, pairs, masks, grad = make_inputs("rows that share masks", torch.float32, num_sets=2)
    losses, gradient = run(cells, pairs, masks, grad, backend="triton")
    cells[1, 12 * 3 + 5] = math.nan
    with_nan, gradient_with_nan = run(cells, pairs, masks, grad, backend="triton")
    assert with_nan.isnan().nonzero().tolist() == [[1, 3]]
    assert torch.equal(with_nan[~with_nan.isnan()], losses[~with_nan.isnan()])
    others = torch.ones_like(cells, dtype=torch.bool)
    others[1, 12 * 3 : 12 * 4] = False
    assert torch.equal(gradient_with_nan[others], gradient[others])


def test_repeatable_and_the_same_without_gradient():
    cells, pairs, masks, grad = on_device(make_inputs(MANY, torch.float32, num_sets=2))
    first = run(cells, pairs, masks, grad, backend="triton")
    for _ in range(1 if device.DEVICE.type == "cpu" else 3):
        for a, b in zip(run(cells, pairs, masks, grad, backend="triton"), first, strict=True):
            assert torch.equal(a, b)
    losses, gradient = backend.compute_losses(cells, pairs, masks, False)
    assert gradient is None and torch.equal(losses, first[0])


def test_two_launches_for_all_pairs_and_none_in_backward(launches):
    cells, pairs, masks, grad = on_device(make_inputs(MANY, torch.float32, num_sets=2))
    losses = mask_bce(cells.requires_grad_(), pairs, masks, backend="triton")
    assert [launch[:2] for launch in launches] == [("bands", (6, 4, 2)), ("combine", (6, 2))]
    torch.autograd.grad(losses, cells, grad.float())
    assert len(launches) == 2


@pytest.mark.parametrize("num_sets, num_pairs", [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_compare(num_sets, num_pairs, launches):
    masks, pairs = make_masks([(5, 6)]), make_pairs([(2, 3)] * num_pairs, [0] * num_pairs)
    cells = torch.rand(num_sets, pairs.num_cells, requires_grad=True)
    cells, pairs, masks = on_device((cells, pairs, masks))
    losses = mask_bce(cells, pairs, masks, backend="triton")
    assert losses.shape == (num_sets, num_pairs) and launches == []
    losses.sum().backward()
    assert cells.grad.shape == cells.shape


def test_numbers_without_a_mask_stay_in_memory():
    """On a device nobody looks at them."""
    cells, pairs, masks, _ = make_inputs("rows that share masks", torch.float32)
    wrong = make_pairs([(3, 4)] * 5, [7, -3, 1, 2, 0])
    clamped = make_pairs([(3, 4)] * 5, [1, 0, 1, 1, 0])
    cells, masks, wrong, clamped = on_device((cells, masks, wrong, clamped))
    for a, b in zip(
        backend.compute_losses(cells, wrong, masks, True),
        backend.compute_losses(cells, clamped, masks, True),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_masks_of_more_than_two_gigabytes():
    """Of which only the last is used: the memory before it is never touched."""
    last = make_masks([(7, 9)])
    sizes = ((2**16, 2**18), (7, 9))
    torch.use_deterministic_algorithms(False)  # else the memory would be filled
    bits = torch.empty(2**31 + last.bits.numel(), dtype=torch.uint8)
    bits[2**31 :] = last.bits
    masks = PackedMasks(bits, packed_masks._table(sizes), sizes)
    cells, pairs, grad = torch.rand(1, 6), make_pairs([(2, 3)], [1]), torch.randn(1, 1)
    expected = run(cells, make_pairs([(2, 3)], [0]), last, grad, backend="triton")
    for a, e in zip(run(cells, pairs, masks, grad, backend="triton"), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.interpreter
def test_bytes():
    """Mask bits, cells and partials move; nothing of the size of pixels x 4 bytes."""
    height, width, grid = 40, 96, (4, 6)
    cells, pairs, masks, grad = random_inputs([grid] * 3, [(height, width)] * 2, [0, 1, 0])
    cells.requires_grad_()
    num_pairs, num_cells, pixels = len(pairs), pairs.num_cells, height * width
    with count_bytes() as traffic:
        losses = mask_bce(cells, pairs, masks, backend="triton")
        torch.autograd.grad(losses, cells, grad)
    bands, combine = "bands_kernel", "combine_kernel"
    bits = traffic.total(kernel=bands, tensor="bits", access="load")
    assert bits.unique == masks.bits.numel()
    assert bits.issued == num_pairs * pixels  # the byte of a pixel, once for every pair
    read = traffic.total(kernel=bands, tensor="cells", access="load")
    assert read.unique == num_cells * 4 and read.issued == 4 * read.unique
    written = traffic.total(kernel=bands, tensor="partials", access="store")
    assert written.issued == written.unique == 5 * num_cells * 4
    read = traffic.total(kernel=combine, tensor="partials", access="load")
    # the loss and the four corners, each of which falls on one cell
    assert read.issued == read.unique == 5 * num_cells * 4
    for tensor, size in (("gradient", num_cells * 4), ("losses", num_pairs * 4)):
        written = traffic.total(kernel=combine, tensor=tensor, access="store")
        assert written.issued == written.unique == size
    assert sum(row.unique for row in traffic.rows()) < pixels * 4
    assert max(row.unique for row in traffic.rows() if row.kernel.startswith("torch.")) <= 3 * num_cells * 4
