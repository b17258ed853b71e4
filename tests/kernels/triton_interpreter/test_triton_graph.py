"""Noun attention in Triton as a node of a graph: repeatable, lean, opaque to the compiler, its launches counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.kernels.byte_counter import count_bytes
from swim_kernels import NounQueries, noun_attention
from tests.kernels import device
from tests.kernels.device import on_device
from tests.kernels.noun_attention_cases import log_sum_exp, make_inputs, make_queries, over_sets, run
from tests.kernels.triton_interpreter.cases import backend, plans, random_inputs, random_queries, shared

FEW, MANY = 5, 18  # rows: one tile; several blocks


@pytest.fixture(params=[FEW, MANY], ids=["few rows", "many rows"])
def inputs(request):
    """query, key, queries, gradient of the maps; several rows on one token, keys named several times"""
    rows = [(r % 2, 60 + r % 3, r % 5, 61 + r % 3, 0) for r in range(request.param)]
    sets = torch.randint(0, 60, (1, 62), generator=torch.Generator().manual_seed(1)).tolist()
    queries = make_queries(rows, sets)
    query, key, grad = random_inputs(queries, 2, 7, 1, 64, 32, torch.bfloat16)
    return on_device((query, key, queries, grad))


def test_bitwise_repeatable(inputs):
    first = run(*inputs, backend="triton")
    for _ in range(1 if device.DEVICE.type == "cpu" else 3):
        for a, e in zip(run(*inputs, backend="triton"), first, strict=True):
            assert torch.equal(a, e)


def test_order_of_the_rows_does_not_matter_to_the_maps(inputs):
    query, key, queries, grad = inputs
    # exact products: in the interpreter numpy rounds others differently from one column of a matrix to the next
    query, key = (x.mul(4).round().div(4) for x in (query, key))
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(2))
    shuffled = dataclasses.replace(
        queries, **{f.name: getattr(queries, f.name)[order] for f in dataclasses.fields(queries)[:5]}
    )
    maps = noun_attention(query, key, queries, backend="triton")
    assert torch.equal(noun_attention(query, key, shuffled, backend="triton"), maps[order])


@pytest.mark.parametrize("given_lse", [False, True])
def test_launches_of_a_layer(inputs, given_lse, launches):
    """As the docstring of the backend and the README say."""
    query, key, queries, grad = inputs
    lse = log_sum_exp(query, key, queries, 32**-0.5).float() if given_lse else None
    query.requires_grad_(), key.requires_grad_()
    maps = noun_attention(query, key, queries, lse=lse, backend="triton")
    forward = ["maps"] if given_lse else ["lse_partials", "lse_combine", "maps"]
    assert [launch.name for launch in launches] == forward
    launches.clear()
    maps.backward(grad)
    names = [launch.name for launch in launches]
    if len(queries) == FEW:
        assert names == ["delta_partials", "gradients", "query_gradient_sum"]
    else:  # one split of δ: no sum of partials
        assert names == ["delta_partials", "query_gradients", "query_gradient_sum", "key_gradients"]


def test_many_rows_on_many_columns_add_up_delta_first(launches):
    queries = random_queries(40, batch=1, length=800, num_sets=1, num_columns=700)
    query, key, grad = random_inputs(queries, 1, 4, 2, 800, 16)
    run(query, key, queries, grad, backend="triton")
    backward = ["delta_partials", "delta_sum", "query_gradients", "query_gradient_sum", "key_gradients"]
    assert [launch.name for launch in launches] == ["lse_partials", "lse_combine", "maps", *backward]


@pytest.mark.interpreter
def test_a_softmax_over_patches_looks_at_nothing_else(launches):
    """Its lse is split by columns, its blocks of rows are those of a patch, ∂k is added to where patches are."""
    length, patches, cells, heads = 1000, [2, 7], 100, 2
    sets = [range(patch * cells, (patch + 1) * cells) for patch in patches]
    queries = over_sets([(0, 990 + token, patch) for token in range(5) for patch in range(2)], sets)
    query, key, grad = random_inputs(queries, 1, 4, heads, length, 32, torch.bfloat16)
    query.requires_grad_()
    maps = noun_attention(query, key, queries, backend="triton")
    plan = shared.plan_tables(query, key, queries)
    assert [launch.grid for launch in launches if launch.name == "lse_partials"] == [(1, heads, len(plan[2]))]
    blocks = [block for block in plan[2].tolist() if block[1] < block[2]]
    assert [block[3:5] for block in blocks] == [[patch * cells, (patch + 1) * cells] for patch in patches]
    buffers = torch.zeros_like(query), torch.zeros_like(key)
    with torch.no_grad(), count_bytes() as traffic:
        lse = backend.maps_and_lse(query, key, queries, 0.2)[1]
        backend.add_gradients(*buffers, grad, query, key, queries, 0.2, lse)
    bytes_of_patches = 2 * cells * heads * 32 * 2
    assert traffic.total(kernel="lse_partials_kernel", tensor="key").issued == bytes_of_patches
    tile = next(launch.arguments["BLOCK_KEYS"] for launch in launches if launch.name == "key_gradients")
    for access in ("load", "store"):
        added = traffic.total(tensor="grad_key", access=access).issued
        assert bytes_of_patches <= added <= 2 * (cells + 2 * tile) * heads * 32 * 2
    inside = torch.zeros(length, dtype=torch.bool)
    inside[queries.key_sets.flatten()] = True
    assert torch.equal(buffers[1].ne(0).any(dim=1).any(dim=-1)[0], inside) and maps.shape == (10, cells)


def test_launches_depend_on_shapes_only(launches):
    """So a CUDA graph captured on one batch is right for the next one."""
    grids = []
    for seed in range(2):
        queries = random_queries(30, batch=3, length=150, num_sets=2, num_columns=60, seed=seed)
        width = 60 - queries.key_sets.shape[1]
        queries = dataclasses.replace(queries, key_sets=torch.nn.functional.pad(queries.key_sets, (0, width), value=-1))
        query, key, grad = random_inputs(queries, 3, 4, 2, 150, 16, seed=seed)
        run(query, key, queries, grad, backend="triton")
        grids.append([(launch.name, launch.grid) for launch in launches])
        launches.clear()
    assert grids[0] == grids[1]


@pytest.mark.parametrize("over", ["range", "set"])
def test_nothing_is_read_back(over):
    """Fake tensors have no values: any read-back, size that depends on values or boolean index raises."""
    queries = random_queries(30, batch=3, length=150, num_sets=2, num_columns=60)
    queries = dataclasses.replace(queries, over=over)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [mode.from_tensor(t) for t in queries.tensors()]
        plan = plans.make_plan(NounQueries(*fake, over=over), 3, 150, 16)
    real = plans.make_plan(queries, 3, 150, 16)
    for f, r in zip(plan, real, strict=True):
        assert f.shape == r.shape and f.dtype == r.dtype == torch.int32


def test_plan_is_made_once_per_batch(inputs, monkeypatch):
    query, key, queries, grad = inputs
    made = []
    monkeypatch.setattr(plans, "make_plan", lambda *a, f=plans.make_plan: made.append(1) or f(*a))
    for _ in range(3):  # layers
        run(query, key, queries, grad, backend="triton")
    assert len(made) == 1
    before = noun_attention(query, key, queries, backend="triton")
    queries.key_end.sub_(30)  # a plan of what was there before would be wrong
    after = noun_attention(query, key, queries, backend="triton")
    assert len(made) == 2 and not torch.equal(before, after)
    remembered = len(plans._plans)
    del queries, inputs
    assert len(plans._plans) <= remembered


def test_plan_is_forgotten_with_its_batch():
    import gc

    queries = make_queries([(0, 5, 0, 6, 0)], [[1, 2]])
    plans.plan_of(queries, 1, 9, 16)
    gc.collect()
    remembered = len(plans._plans)
    del queries
    gc.collect()
    assert len(plans._plans) == remembered - 1


class Allocated(TorchDispatchMode):
    """Bytes of what the operations return, by address."""

    def __init__(self):
        super().__init__()
        self.tensors = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return out


def test_nothing_is_allocated_but_outputs_and_partials(inputs, monkeypatch):
    """Called below autograd, so that what is allocated inside shows."""
    monkeypatch.setattr(shared, "launch", lambda *arguments, **options: None)  # the interpreter allocates too
    query, key, queries, grad = inputs
    num_rows, num_columns = grad.shape
    batch, num_heads, length, head_dim = query.shape
    scale, row_block = 0.2, shared.columns_for("maps", num_rows, 8, head_dim, "bf16") // 8
    plan = list(plans.plan_of(queries, batch, length, row_block))
    row_heads = 4 * num_rows * num_heads
    with Allocated() as forward:
        lse = backend.log_sum_exp._init_fn(query, key, plan, scale, False)
        backend.maps_of._init_fn(query, key, lse, plan, scale, False, False)
    # lse, its two partials (one split), maps
    assert sorted(size for size in forward.tensors.values() if size) == sorted(
        [row_heads, 2 * row_heads, 4 * grad.numel()]
    )
    with Allocated() as backward:
        backend.gradients_of._init_fn(grad, query, key, lse, plan, scale, True, True, False)
    outputs = [2 * query.numel(), 2 * key.numel()]
    partials = [row_heads, row_heads * head_dim, 4 * grad.numel()]  # δ, ∂q (one split each), weights
    assert sorted(size for size in backward.tensors.values() if size) == sorted(outputs + partials)


@pytest.mark.parametrize("given_lse", [False, True])
def test_what_is_kept(inputs, given_lse):
    """query and key themselves, lse and the plan; nothing with Hq × R × L elements."""
    query, key, queries, _ = inputs
    query.requires_grad_(), key.requires_grad_()
    lse = log_sum_exp(query, key, queries, 1.0).float() if given_lse else None
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        noun_attention(query, key, queries, scale=1.0, lse=lse, backend="triton")
    assert kept[0].data_ptr() == query.data_ptr() and kept[1].data_ptr() == key.data_ptr()
    assert kept[2].shape == (len(queries), query.shape[1])
    assert sum(t.numel() for t in kept[3:]) < 2 * query.shape[0] * query.shape[2] * 8 + 40 * len(queries) + 200


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_only_the_gradient_asked_for_is_computed(inputs, wanted, launches):
    query, key, queries, grad = inputs
    exact = dict(zip(("query", "key"), run(query, key, queries, grad, backend="triton")[1:], strict=True))
    leaves = {"query": query.detach(), "key": key.detach()}
    leaves[wanted].requires_grad_()
    maps = noun_attention(leaves["query"], leaves["key"], queries, backend="triton")
    launches.clear()
    (actual,) = torch.autograd.grad(maps, leaves[wanted], grad)
    torch.testing.assert_close(actual, exact[wanted], rtol=1e-2, atol=1e-4)
    expected = ["query_gradients", "query_gradient_sum"] if wanted == "query" else ["key_gradients"]
    assert [launch.name for launch in launches] == ["delta_partials", *expected]
    assert not noun_attention(query.detach(), key.detach(), queries, backend="triton").requires_grad


def test_gradients_keep_the_strides(inputs):
    query, key, queries, grad = inputs
    _, grad_query, grad_key = run(query, key, queries, grad, backend="triton")
    assert grad_query.stride() == query.stride() and grad_key.stride() == key.stride()


def test_gradient_of_any_strides(inputs):
    query, key, queries, grad = inputs
    expected = run(query, key, queries, grad, backend="triton")
    for a, e in zip(run(query, key, queries, grad.t().contiguous().t(), backend="triton"), expected, strict=True):
        assert torch.equal(a, e)
    one = torch.ones(())
    expected = run(query, key, queries, torch.ones_like(grad), backend="triton")
    for a, e in zip(run(query, key, queries, one.expand(grad.shape), backend="triton"), expected, strict=True):
        assert torch.equal(a, e)


def test_second_derivative_is_refused(inputs):
    query, key, queries, _ = inputs
    query.requires_grad_()
    maps = noun_attention(query, key, queries, backend="triton")
    (grad,) = torch.autograd.grad(maps.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula|double backward|not.*differentia"):
        grad.sum().backward()


def test_non_reentrant_checkpointing(inputs):
    query, key, queries, grad = inputs
    expected = run(query, key, queries, grad, backend="triton")
    query.requires_grad_(), key.requires_grad_()
    maps = checkpoint(lambda q, k: noun_attention(q, k, queries, backend="triton"), query, key, use_reentrant=False)
    for a, e in zip((maps, *torch.autograd.grad(maps, (query, key), grad)), expected, strict=True):
        assert torch.equal(a, e)


def test_autocast_changes_nothing():
    query, key, queries, grad = make_inputs("group of 7", torch.float32)
    expected = run(query, key, queries, grad, backend="triton")
    with torch.autocast(device.DEVICE.type, dtype=torch.bfloat16):
        actual = run(query, key, queries, grad, backend="triton")
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def operator_arguments(inputs):
    query, key, queries, _ = inputs
    batch, _, length, head_dim = query.shape
    row_block = shared.columns_for("maps", len(queries), 8, head_dim, "bf16") // 8
    return query, key, list(plans.plan_of(queries, batch, length, row_block)), 0.2


@pytest.mark.real_values
def test_operators_are_registered_properly(inputs):
    """Schema, fake implementation, autograd, and both again with symbolic shapes."""
    query, key, plan, scale = operator_arguments(inputs)
    lse = backend.log_sum_exp(query, key, plan, scale, False)
    grad = inputs[-1]
    torch.library.opcheck(backend.log_sum_exp, (query, key, plan, scale, False))
    torch.library.opcheck(backend.gradients_of, (grad, query, key, lse, plan, scale, True, True, False))
    query.requires_grad_(), key.requires_grad_()
    torch.library.opcheck(backend.maps_of, (query, key, lse, plan, scale, False, False))


@pytest.mark.real_values
@pytest.mark.parametrize("given_lse", [False, True])
def test_compiled_in_one_piece(inputs, given_lse):
    query, key, queries, grad = inputs
    lse = log_sum_exp(query, key, queries, 32**-0.5).float() if given_lse else None

    def layers(query, key, queries, lse):
        maps = [noun_attention(query * factor, key, queries, lse=lse, backend="triton") for factor in (1.0, 1.0)]
        return maps[0] + maps[1]

    expected = layers(query.requires_grad_(), key.requires_grad_(), queries, lse)
    expected = (expected, *torch.autograd.grad(expected, (query, key), grad))
    maps = torch.compile(layers, backend="aot_eager", fullgraph=True)(query, key, queries, lse)
    for a, e in zip((maps, *torch.autograd.grad(maps, (query, key), grad)), expected, strict=True):
        assert torch.equal(a, e)
