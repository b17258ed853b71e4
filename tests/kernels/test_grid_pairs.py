"""GridPairs: the table of the pairs, its stretches of one grid size, whether pairs share columns."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from swim_kernels.structs.grid_pairs import FIELDS, GridPairs


def make_pairs(pairs, dtype=torch.int64):
    """pairs: (row, start, h, w, mask)"""
    row, start, _, _, mask = torch.tensor(pairs, dtype=dtype).reshape(-1, 5).unbind(1)
    return GridPairs.from_rows(row, start, [(h, w) for _, _, h, w, _ in pairs], mask)


PAIRS = [(2, 7, 3, 5, 1), (0, 0, 3, 5, 0), (0, 15, 1, 1, 4), (4, 30, 5, 3, 0), (4, 2, 5, 3, 2)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_table(dtype):
    pairs = make_pairs(PAIRS, dtype)
    assert pairs.table.dtype == torch.int32 and pairs.table.is_contiguous()
    assert pairs.table.tolist() == [
        [2, 7, 3, 5, 0, 1, 0, 0],
        [0, 0, 3, 5, 15, 0, 0, 0],
        [0, 15, 1, 1, 30, 4, 0, 0],
        [4, 30, 5, 3, 31, 0, 0, 0],
        [4, 2, 5, 3, 46, 2, 0, 0],
    ]
    assert pairs.table.shape[1] == FIELDS
    assert len(pairs) == 5 and pairs.num_cells == 61 and pairs.device.type == "cpu"
    assert pairs.sizes == ((3, 5), (3, 5), (1, 1), (5, 3), (5, 3))


def test_fields_may_be_strided():
    fields = torch.tensor(PAIRS)[:, [0, 1, 4]]
    pairs = GridPairs.from_rows(fields[:, 0], fields[:, 1], [(h, w) for _, _, h, w, _ in PAIRS], fields[:, 2])
    assert torch.equal(pairs.table, make_pairs(PAIRS).table)


def test_runs_are_stretches_of_one_grid_size():
    """In order, covering every pair and every cell once; 3 x 5 and 5 x 3 have as many cells but differ."""
    assert list(make_pairs(PAIRS).runs()) == [
        (slice(0, 2), slice(0, 30), (3, 5)),
        (slice(2, 3), slice(30, 31), (1, 1)),
        (slice(3, 5), slice(31, 61), (5, 3)),
    ]
    again = make_pairs([PAIRS[0], PAIRS[2], PAIRS[1]])  # a size that comes back is a stretch of its own
    assert [size for _, _, size in again.runs()] == [(3, 5), (1, 1), (3, 5)]


def test_cells_in_the_maps():
    rows, columns = make_pairs(PAIRS).cells
    expected = [(row, start + cell) for row, start, h, w, _ in PAIRS for cell in range(h * w)]
    assert rows.dtype == columns.dtype == torch.int64
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    rows, columns = make_pairs(PAIRS).to("meta").cells
    assert rows.device.type == "meta" and rows.shape == columns.shape == (61,)
    rows, columns = make_pairs([]).cells
    assert rows.dtype == columns.dtype == torch.int64 and rows.shape == columns.shape == (0,)


def test_mask_indices_are_known_on_other_devices():
    pairs = make_pairs(PAIRS)
    assert pairs.mask_indices == (1, 0, 4, 0, 2)
    assert pairs.to("meta").mask_indices == pairs.to("meta").to("meta").mask_indices == pairs.mask_indices
    assert make_pairs([]).mask_indices == ()


@pytest.mark.parametrize(
    "pairs, disjoint",
    [
        (PAIRS, True),
        ([(0, 0, 2, 3, 0), (0, 6, 2, 3, 0)], True),  # side by side
        ([(0, 6, 2, 3, 0), (0, 0, 2, 3, 0)], True),
        ([(0, 0, 2, 3, 0), (0, 5, 2, 3, 0)], False),  # one column
        ([(0, 5, 2, 3, 0), (0, 0, 2, 3, 0)], False),
        ([(0, 0, 2, 3, 0), (1, 5, 2, 3, 0)], True),  # of another row
        ([(3, 4, 2, 3, 0), (3, 4, 2, 3, 1)], False),  # one frame, two masks
        ([(0, 0, 9, 9, 0), (0, 10, 1, 1, 0), (0, 200, 1, 1, 0), (0, 70, 1, 1, 0)], False),  # one within another
        ([(1, 5, 1, 1, 0), (0, 5, 1, 1, 0), (1, 6, 1, 1, 0)], True),
        ([(2, 3, 4, 4, 0)], True),
        ([], True),
    ],
)
def test_disjoint(pairs, disjoint):
    assert make_pairs(pairs).disjoint is disjoint


def test_disjoint_is_not_claimed_where_nobody_looks():
    row, start, _, _, mask = (t.to("meta") for t in torch.tensor(PAIRS).unbind(1))
    pairs = GridPairs.from_rows(row, start, [(h, w) for _, _, h, w, _ in PAIRS], mask)
    assert pairs.device.type == "meta" and pairs.table.shape == (5, 8) and not pairs.disjoint


def test_to_takes_along_what_is_known():
    for pairs in (make_pairs(PAIRS), make_pairs([PAIRS[0], PAIRS[0]])):
        moved = pairs.to("meta", non_blocking=True)
        assert moved.device.type == "meta" and moved.table.dtype == torch.int32
        assert (moved.sizes, moved.disjoint) == (pairs.sizes, pairs.disjoint)
        assert list(moved.runs()) == list(pairs.runs()) and moved.num_cells == pairs.num_cells


def test_no_pair():
    pairs = make_pairs([])
    assert len(pairs) == 0 and pairs.num_cells == 0 and pairs.sizes == () and list(pairs.runs()) == []
    assert pairs.table.shape == (0, FIELDS) and pairs.table.dtype == torch.int32
    assert len(pairs.to("meta")) == 0


def test_travels_between_processes():
    pairs = make_pairs(PAIRS)
    assert pairs.num_cells == 61  # kept as a property's value
    for other in (pickle.loads(pickle.dumps(pairs)), copy.deepcopy(pairs)):
        assert torch.equal(other.table, pairs.table)
        assert (other.sizes, other.disjoint, other.num_cells) == (pairs.sizes, pairs.disjoint, 61)


def test_is_frozen():
    with pytest.raises(AttributeError):
        make_pairs(PAIRS).disjoint = True
