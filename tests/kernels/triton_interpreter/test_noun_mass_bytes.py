"""What noun mass loads, stores and allocates: every key once, and nothing with a number for each row and key."""

import pytest
import torch

from benchmarks.kernels.byte_counter import count_bytes
from swim_kernels import NounQueries, noun_mass
from tests.kernels.triton_interpreter.cases import shared
from tests.kernels.triton_interpreter.test_noun_mass_triton import backend, tables
from tests.kernels.triton_interpreter.test_triton_graph import Allocated

pytestmark = pytest.mark.interpreter
HEADS, KEY_HEADS, HEAD_DIM, LENGTH = 14, 2, 64, 2048
KEY_BYTES = KEY_HEADS * HEAD_DIM * 2  # of one token, bf16
VIDEO, SYSTEM = range(20, 1900), range(16)


def make_inputs(num_rows):
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(1, heads, LENGTH, HEAD_DIM, generator=generator).bfloat16() for heads in (HEADS, KEY_HEADS)
    )
    position = LENGTH - 1 - torch.arange(num_rows)
    zeros = torch.zeros_like(position)
    queries = NounQueries(zeros, position, zeros, position + 1, zeros, torch.empty(1, 0, dtype=torch.int64))
    sets = torch.full((1, 2, len(VIDEO)), -1)
    sets[0, 0], sets[0, 1, : len(SYSTEM)] = torch.tensor(VIDEO), torch.tensor(SYSTEM)
    return query.requires_grad_(), key.requires_grad_(), queries, sets


@pytest.fixture(scope="module", params=[4, 24], ids=["few rows", "many rows"])
def counted(request):
    """Number of rows, and traffic of forward with lse computed and given, and of backward."""
    query, key, queries, sets = make_inputs(request.param)
    with torch.no_grad(), count_bytes() as given:
        noun_mass(query, key, queries, sets, lse=torch.full((len(queries), HEADS), 8.0), backend="triton")
    with count_bytes() as forward:
        masses = noun_mass(query, key, queries, sets, backend="triton")
    with count_bytes() as backward:
        masses.backward(torch.ones_like(masses))
    return len(queries), forward, given, backward


def test_forward_reads_every_key_once_for_each_block_of_rows(counted):
    num_rows, forward, given, _ = counted
    for traffic, num_keys in ((forward, LENGTH), (given, len(VIDEO) + len(SYSTEM))):
        read = traffic.total(tensor="key", access="load")
        assert read.unique == num_keys * KEY_BYTES
        # a block after the first ends at an earlier row, some keys before the last
        blocks = -(-num_rows // 8)
        assert blocks * read.unique - blocks * num_rows * KEY_BYTES <= read.issued <= blocks * read.unique


def test_backward_reads_the_keys_once_or_twice_and_writes_their_gradient_once(counted):
    num_rows, _, _, backward = counted
    passes = backward.total(tensor="key", access="load").unique / (LENGTH * KEY_BYTES)
    assert passes == (1 if num_rows == 4 else 2)  # one for both gradients, or one for each
    written = backward.total(tensor="grad_key", access="store")
    assert written.issued == written.unique == LENGTH * KEY_BYTES


def test_forward_stores_less_than_a_head_averaged_map(counted):
    """Partials of the sums included; a map of each head is 14 times that."""
    num_rows, forward, given, _ = counted
    for traffic in (forward, given):
        stored = [row for row in traffic.rows() if row.access == "store" and not row.kernel.startswith("torch.")]
        assert {row.tensor for row in stored} <= {"maxima", "sums", "parts", "masses", "lse"}
        assert sum(row.unique for row in stored) < num_rows * len(VIDEO) * 4


def test_nothing_is_allocated_but_outputs_and_partials(monkeypatch):
    """Called below autograd, so that what is allocated inside shows."""
    monkeypatch.setattr(shared, "launch", lambda *arguments, **options: None)  # the interpreter allocates too
    query, key, queries, sets = make_inputs(num_rows := 24)
    query, key = query.detach(), key.detach()
    plan, members = shared.plan_tables(query, key, queries), tables.members_of(sets, LENGTH)
    assert members.shape == (1, 1, LENGTH)  # a bit for each key and set, for all rows
    with Allocated() as forward:
        masses, lse = backend.masses_of._init_fn(query, key, None, plan, members, 2, 0.1, False)
    splits = sum(forward.tensors.values()) // (4 * num_rows * HEADS) - 3
    row_heads = 4 * num_rows * HEADS
    # lse, masses of both sets, and of each split maximum, sum and the sums of both sets
    expected = [row_heads, 2 * row_heads, 2 * (splits // 4) * row_heads, 2 * (splits // 4) * row_heads]
    assert sorted(size for size in forward.tensors.values() if size) == sorted(expected)
    with Allocated() as backward:
        backend.gradients_of._init_fn(
            torch.ones_like(masses), masses, query, key, lse, plan, members, 0.1, True, True, False
        )
    outputs = {2 * query.numel(), 2 * key.numel()}
    partials = row_heads * HEAD_DIM  # of ∂q, a split
    others = [size for size in backward.tensors.values() if size not in outputs]
    assert {size for size in others if size <= 2 * row_heads} == {row_heads, 2 * row_heads}  # δ, and its terms
    (of_query,) = [size for size in others if size > 2 * row_heads]
    assert of_query % partials == 0 and of_query // partials <= LENGTH // 512
