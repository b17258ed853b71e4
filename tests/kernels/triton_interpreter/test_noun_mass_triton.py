"""Noun mass in Triton against float64, values and gradients, and as a node of a graph."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from swim_kernels import noun_mass
from tests.kernels.budget import assert_within_budget
from tests.kernels.device import on_device
from tests.kernels.noun_attention_cases import log_sum_exp, make_queries, over_sets
from tests.kernels.noun_mass_cases import CASES, make_inputs, make_sets, random_sets, run
from tests.kernels.triton_interpreter.cases import random_inputs, random_queries, shared

pytestmark = pytest.mark.usefixtures("poisoned")
backend = importlib.import_module("swim_kernels.noun_mass.triton.launch")
tables = importlib.import_module("swim_kernels.noun_mass.triton.members")
NAMES = ("masses", "∂query", "∂key")
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


def sample(query, key, queries, sets, grad, given_lse=False):
    """(triton, eager, exact)"""
    lse = log_sum_exp(query, key, queries, query.shape[-1] ** -0.5).float() if given_lse else None
    exact = run(query.double(), key.double(), queries, sets, grad, backend="eager")
    eager, actual = (run(query, key, queries, sets, grad, lse=lse, backend=name) for name in ("eager", "triton"))
    return actual, eager, exact


def many_inputs(num_rows, *shape, num_sets=None, dtype=torch.float32, over="range"):
    """shape: of `random_inputs`: B, Hq, Hkv, L, D. num_sets: of scattered keys; None: those of `random_sets`."""
    batch, num_heads, _, length, _ = shape
    queries = random_queries(num_rows, batch, length, num_sets=2, num_columns=length // 2)
    queries = dataclasses.replace(queries, over=over)
    query, key, _ = random_inputs(queries, *shape, dtype)
    sets = random_sets(2, length)
    generator = torch.Generator().manual_seed(num_rows)
    if num_sets is not None:
        sets = torch.randint(-1, length, (2, num_sets, 9), generator=generator)
    grad = torch.randn(num_rows, num_heads, sets.shape[1], generator=generator)
    return query, key, queries, sets, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype):
    layouts = [("contiguous", "transposed"), ("sliced", "contiguous"), ("transposed", "head_dim first")]
    samples = []
    for seed, layout in enumerate(layouts):
        query, key, queries, sets, grad = make_inputs(case, dtype, layout, seed)
        samples.append(sample(query, key, queries, sets, grad.float(), given_lse=seed == 1))
    assert_within_budget(samples, NAMES)


@pytest.mark.parametrize("over", ["range", "set"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(dtype, over):
    """More than fit one tile: blocks, in several sequences and key sets, ∂q and ∂k in passes of their own."""
    inputs = many_inputs(40, 2, 10, 2, 110, 16, dtype=dtype, over=over)
    assert_within_budget([sample(*inputs)], NAMES)


@pytest.mark.parametrize("num_sets", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("num_rows", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_more_sets_than_a_word_has_bits(num_sets, num_rows):
    inputs = many_inputs(num_rows, 1, 4, 2, 90, 16, num_sets=num_sets)
    for given_lse in (False, True):
        assert_within_budget([sample(*inputs, given_lse=given_lse)], NAMES)


@pytest.mark.parametrize("num_rows", [3, 40])
def test_several_splits(num_rows, launches):
    """Long enough that masses and ∂q are put together from partials, of splits with one tile more or less."""
    inputs = many_inputs(num_rows, 1, 4, 2, 1301, 16, dtype=torch.bfloat16)
    assert_within_budget([sample(*inputs)], NAMES)
    splits = {launch.name: launch.grid[0] for launch in launches}
    assert (splits["mass_partials"], splits["gradients" if num_rows == 3 else "query_gradients"]) == (10, 2)


@pytest.mark.parametrize("num_heads, num_key_heads", [(1, 1), (5, 1), (7, 1), (16, 1)])
@pytest.mark.parametrize("head_dim", [1, 80, 128])
def test_groups_and_head_dims(num_heads, num_key_heads, head_dim):
    for num_rows in (3, 20):
        inputs = many_inputs(num_rows, 1, num_heads, num_key_heads, 75, head_dim)
        assert_within_budget([sample(*inputs)], NAMES)


def test_disjoint_sets_of_all_keys_have_mass_one():
    query, key, queries, *_ = many_inputs(9, 1, 14, 2, 130, 32)
    sets = make_sets([[range(0, 130, 2), range(1, 130, 2)]] * 2)
    masses = noun_mass(*on_device([query, key, queries, sets]), backend="triton")
    torch.testing.assert_close(masses.sum(-1).cpu(), torch.ones(9, 14))


def test_where_gradients_are_zero():
    for num_rows in (2, 60):
        queries = make_queries([(2, 150 - r, 70, 151 - r, 0) for r in range(num_rows)], [[]])
        query, key, _ = random_inputs(queries, 3, 4, 2, 200, 16)
        grad = torch.randn(num_rows, 4, 1)
        _, grad_query, grad_key = run(query, key, queries, make_sets([[range(75, 80)]]), grad, backend="triton")
        tagged, in_range = torch.zeros(2, 3, 200, dtype=torch.bool)
        tagged[queries.sequence, queries.position] = True
        in_range[2, 70:151] = True
        assert torch.equal(grad_query.ne(0).any(dim=1)[..., 0], tagged)
        assert torch.equal(grad_key.ne(0).all(dim=1).all(dim=-1), in_range)
        assert torch.equal(grad_key.ne(0).any(dim=1).any(dim=-1), in_range)


@pytest.mark.parametrize(
    "rows, groups, num_sets, width",
    [(0, 2, 3, 4), (0, 0, 3, 4), (2, 1, 0, 4), (2, 1, 3, 0), (2, 1, 3, 4)],
    ids=["R = 0", "G = 0", "S = 0", "M = 0", "empty sets"],
)
@pytest.mark.parametrize("given_lse", [False, True])
def test_nothing_to_sum(rows, groups, num_sets, width, given_lse):
    query, key, *_ = make_inputs("plain", torch.bfloat16)
    queries = make_queries([(0, 5 + r, 0, 6 + r, 0) for r in range(rows)], [[]] * groups)
    lse = torch.zeros(rows, 4) if given_lse else None
    query, key, queries, lse = on_device([query, key, queries, lse])
    sets = torch.full((groups, num_sets, width), -1, device=query.device)
    masses = noun_mass(query, key, queries, sets, lse=lse, backend="triton")
    assert masses.shape == (rows, 4, num_sets) and masses.dtype == torch.float32 and not masses.any()
    masses.sum().backward()
    for tensor in (query, key):
        assert tensor.grad.dtype == torch.bfloat16 and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_empty_softmax_gives_zeros():
    """`NounQueries.check` refuses such a range, but on an accelerator nobody looks: no NaN may come of it."""
    query, key, *_ = make_inputs("plain", torch.float32)
    ranges = make_queries([(0, 5, 6, 6, 0), (0, 9, 0, 10, 0), (0, 12, 9, 3, 0)], [[]])
    empty_set = over_sets([(0, 5, 1), (0, 9, 0), (0, 12, 1)], [[1, 2, 7], []])
    for queries, given in ((ranges, False), (ranges, True), (empty_set, False)):
        lse = log_sum_exp(query, key, queries, 1.0).float() if given else None
        sets = make_sets([[[1, 2, 7], [30]]] * len(queries.key_sets))
        moved = on_device([query, key, queries, sets])
        masses = backend.noun_mass_triton(*moved, 1.0, on_device(lse))
        assert masses[1, :, 0].all() and not masses[[0, 2]].any()
        gradients = torch.autograd.grad(masses[..., 0].square().sum(), moved[:2])
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_values_out_of_range_read_no_foreign_memory():
    """Nobody looks at them on an accelerator: wrong masses, but of memory that is there."""
    query, key, *_ = make_inputs("plain", torch.float32)
    queries = make_queries([(7, 99, -5, 1000, 3), (-2, -1, 0, 5, -1)], [[1, 900, 5], [3, 2, 10**6]])
    query, key, queries, sets = on_device([query, key, queries, make_sets([[[1, 900]], [[-7, 10**6]]])])
    masses = backend.noun_mass_triton(query, key, queries, sets, 1.0)
    assert masses.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(masses.sum(), (query, key)))


@pytest.fixture(params=[3, 40], ids=["few rows", "many rows"])
def inputs(request):
    return on_device(many_inputs(request.param, 2, 7, 1, 64, 32, dtype=torch.bfloat16))


def test_bitwise_repeatable(inputs):
    first = run(*inputs, backend="triton")
    for a, e in zip(run(*inputs, backend="triton"), first, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("given_lse", [False, True])
def test_launches_of_a_layer(inputs, given_lse, launches):
    """As the docstring of the backend and the README say."""
    query, key, queries, sets, grad = inputs
    lse = log_sum_exp(query, key, queries, 32**-0.5).float() if given_lse else None
    query.requires_grad_(), key.requires_grad_()
    masses = noun_mass(query, key, queries, sets, lse=lse, backend="triton")
    assert [launch.name for launch in launches] == ["mass_partials", "mass_combine"]
    launches.clear()
    masses.backward(grad)
    few = ["gradients", "query_gradient_sum"]
    many = ["query_gradients", "query_gradient_sum", "key_gradients"]
    assert [launch.name for launch in launches] == (few if len(queries) == 3 else many)


@pytest.mark.parametrize("given_lse", [False, True])
def test_what_is_kept(inputs, given_lse):
    """query and key themselves, lse, masses, the plan and a bit for each key and set; nothing of R × M."""
    query, key, queries, sets, _ = inputs
    query.requires_grad_(), key.requires_grad_()
    lse = log_sum_exp(query, key, queries, 1.0).float() if given_lse else None
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        noun_mass(query, key, queries, sets, scale=1.0, lse=lse, backend="triton")
    assert kept[0].data_ptr() == query.data_ptr() and kept[1].data_ptr() == key.data_ptr()
    assert kept[2].shape == (len(queries), 7) and kept[3].shape == (len(queries), 7, sets.shape[1])
    assert kept[4].shape == (len(sets), 1, key.shape[2]) and kept[4].dtype == torch.int32
    assert sum(t.numel() for t in kept[5:]) < 2 * query.shape[0] * query.shape[2] * 8 + 40 * len(queries) + 200


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_only_the_gradient_asked_for_is_computed(inputs, wanted, launches):
    query, key, queries, sets, grad = inputs
    exact = dict(zip(("query", "key"), run(query, key, queries, sets, grad, backend="triton")[1:], strict=True))
    leaves = {"query": query.detach(), "key": key.detach()}
    leaves[wanted].requires_grad_()
    masses = noun_mass(leaves["query"], leaves["key"], queries, sets, backend="triton")
    launches.clear()
    (actual,) = torch.autograd.grad(masses, leaves[wanted], grad)
    torch.testing.assert_close(actual, exact[wanted], rtol=1e-2, atol=1e-4)
    expected = ["query_gradients", "query_gradient_sum"] if wanted == "query" else ["key_gradients"]
    assert [launch.name for launch in launches] == expected


def test_gradient_of_any_strides(inputs):
    *inputs, grad = inputs
    expected = run(*inputs, grad, backend="triton")
    for a, e in zip(run(*inputs, grad.mT.contiguous().mT, backend="triton"), expected, strict=True):
        assert torch.equal(a, e)
    expected = run(*inputs, torch.ones_like(grad), backend="triton")
    for a, e in zip(run(*inputs, torch.ones(()).expand(grad.shape), backend="triton"), expected, strict=True):
        assert torch.equal(a, e)


def test_table_of_the_sets_is_made_once_per_batch(inputs, monkeypatch):
    query, key, queries, sets, grad = inputs
    sets, made = sets.clone(), []
    monkeypatch.setattr(tables, "make_members", lambda *a, f=tables.make_members: made.append(1) or f(*a))
    for _ in range(3):  # layers
        before = run(query, key, queries, sets, grad, backend="triton")
    assert len(made) == 1
    sets[sets < 30] = -1  # a table of what was there before would be wrong
    after = run(query, key, queries, sets, grad, backend="triton")
    assert len(made) == 2 and not torch.equal(before[0], after[0])
    remembered = len(tables._tables)
    del sets
    assert len(tables._tables) == remembered - 1


def test_nothing_is_read_back():
    """Fake tensors have no values: any read-back, size that depends on values or boolean index raises."""
    sets = random_sets(2, 150)
    real = tables.make_members(sets, 150)
    with FakeTensorMode() as mode:
        fake = tables.make_members(mode.from_tensor(sets), 150)
    assert fake.shape == real.shape and fake.dtype == real.dtype == torch.int32


def operator_arguments(inputs):
    query, key, queries, sets, _ = inputs
    return query, key, shared.plan_tables(query, key, queries), tables.members_of(sets, key.shape[2])


@pytest.mark.real_values
def test_operators_are_registered_properly(inputs):
    query, key, plan, members = operator_arguments(inputs)
    num_sets = inputs[3].shape[1]
    masses, lse = backend.masses_of(query, key, None, plan, members, num_sets, 0.2, False)
    torch.library.opcheck(
        backend.gradients_of, (inputs[-1], masses, query, key, lse, plan, members, 0.2, True, True, False)
    )
    query.requires_grad_(), key.requires_grad_()
    for given in (None, lse):
        torch.library.opcheck(backend.masses_of, (query, key, given, plan, members, num_sets, 0.2, False))


@pytest.mark.real_values
@pytest.mark.parametrize("given_lse", [False, True])
def test_compiled_in_one_piece(inputs, given_lse):
    query, key, queries, sets, grad = inputs
    lse = log_sum_exp(query, key, queries, 32**-0.5).float() if given_lse else None

    def layers(query, key, queries, sets, lse):
        masses = [noun_mass(query * factor, key, queries, sets, lse=lse, backend="triton") for factor in (1.0, 1.0)]
        return masses[0] + masses[1]

    expected = layers(query.requires_grad_(), key.requires_grad_(), queries, sets, lse)
    expected = (expected, *torch.autograd.grad(expected, (query, key), grad))
    masses = torch.compile(layers, backend="aot_eager", fullgraph=True)(query, key, queries, sets, lse)
    for a, e in zip((masses, *torch.autograd.grad(masses, (query, key), grad)), expected, strict=True):
        assert torch.equal(a, e)
