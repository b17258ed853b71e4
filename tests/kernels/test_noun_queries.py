"""NounQueries: what construction and `check` refuse, moving, pickling."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from swim_kernels import NounQueries
from tests.kernels.noun_attention_cases import make_queries

ROWS = [(0, 5, 0, 6, 0), (1, 7, 2, 8, 1)]
SETS = [[1, 2, 3], [4, 5]]


def fields(**changes):
    queries = make_queries(ROWS, SETS)
    return {f.name: getattr(queries, f.name) for f in dataclasses.fields(queries)} | changes


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_legal(dtype):
    queries = make_queries(ROWS, SETS, dtype)
    assert len(queries) == 2 and queries.device == torch.device("cpu")
    queries.check(batch=2, length=8)
    make_queries([], []).check(batch=1, length=1)
    make_queries([(0, 0, 0, 1, 0)], [[]]).check(batch=1, length=1)
    make_queries([(0, 0, 0, 1, 0)], [[0, 0, -1]]).check(batch=1, length=1)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"position": [5, 7]}, TypeError, "position must be a tensor, got list"),
        ({"sequence": None}, TypeError, "sequence must be a tensor, got NoneType"),
        ({"key_end": torch.tensor([6.0, 8.0])}, TypeError, "key_end must be int32 or int64, got torch.float32"),
        ({"key_set": torch.tensor([True, False])}, TypeError, "key_set must be int32 or int64, got torch.bool"),
        ({"key_start": torch.tensor([[0, 2]])}, ValueError, r"key_start must be \[R\], got shape \[1, 2\]"),
        ({"key_sets": torch.tensor([0, 2])}, ValueError, r"key_sets must be \[G, N\], got shape \[2\]"),
        ({"position": torch.tensor([5])}, ValueError, "position has 1 rows, sequence has 2: one entry per row"),
        (
            {"key_sets": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            ValueError,
            "key_sets is on meta, sequence on cpu: all fields must be on one device",
        ),
        (
            {"key_sets": torch.zeros(0, 3, dtype=torch.int64)},
            ValueError,
            "2 rows but no key set to read them on",
        ),
    ],
)
def test_construction_refuses(changes, error, message):
    with pytest.raises(error, match=f"^NounQueries.*{message}"):
        NounQueries(**fields(**changes))


@pytest.mark.parametrize(
    "row, message",
    [
        ((2, 5, 0, 6, 0), r"sequence 2 is outside \[0, 2\)"),
        ((-1, 5, 0, 6, 0), r"sequence -1 is outside \[0, 2\)"),
        ((0, 8, 0, 6, 0), r"position 8 is outside \[0, 8\)"),
        ((0, -3, 0, 6, 0), r"position -3 is outside \[0, 8\)"),
        ((0, 5, -1, 6, 0), "key_start -1 is negative"),
        ((0, 5, 0, 9, 0), "key_end 9 is past the end of the sequence, 8"),
        ((0, 5, 6, 6, 0), "key_end 6 leaves no key: it must be above key_start"),
        ((0, 5, 0, 6, 2), r"key_set 2 is outside \[0, 2\)"),
        ((0, 5, 0, 6, -1), r"key_set -1 is outside \[0, 2\)"),
    ],
)
def test_check_refuses_rows(row, message):
    with pytest.raises(ValueError, match=f"^NounQueries, row 1: {message}$"):
        make_queries([ROWS[0], row], SETS).check(batch=2, length=8)


@pytest.mark.parametrize(
    "keys, message",
    [
        ([0, 8, 1], r"key_sets\[1, 1\] = 8 is neither in \[0, 8\) nor -1, which is no key"),
        ([0, 1, -2], r"key_sets\[1, 2\] = -2 is neither in \[0, 8\) nor -1, which is no key"),
    ],
)
def test_check_refuses_key_sets(keys, message):
    with pytest.raises(ValueError, match=f"^NounQueries.{message}$"):
        make_queries(ROWS, [SETS[0], keys]).check(batch=2, length=8)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_queries(ROWS, SETS).position = torch.zeros(2)


def test_to_moves_every_field():
    queries = make_queries(ROWS, SETS)
    moved = queries.to("meta", non_blocking=True)
    assert all(t.device.type == "meta" for t in moved.tensors())
    assert [t.shape for t in moved.tensors()] == [t.shape for t in queries.tensors()]


def test_travels_between_processes():
    queries = make_queries(ROWS, SETS)
    loader = DataLoader([queries], batch_size=None, num_workers=1)
    for copy in (pickle.loads(pickle.dumps(queries)), *loader):
        assert all(torch.equal(a, b) for a, b in zip(copy.tensors(), queries.tensors(), strict=True))
