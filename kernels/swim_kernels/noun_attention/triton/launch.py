"""Noun attention in Triton: launches of the kernels in `kernels.py`, registered as operators of torch.

Operators that are opaque to `torch.compile` and to CUDA graph capture: lse, maps from lse, and the gradients of the
maps, fresh or added to those of a flash attention. Nothing is read back from the device and nothing depends on values,
so the same launches serve every batch of a shape:

    lse, unless it is handed over         2 launches
    maps                                  1
    ∂q and ∂k, few rows                   3: δ partials; ∂q partials and ∂k in one pass over K; ∂q
    ∂q and ∂k, more than fit one tile     5: δ partials, δ; ∂q partials; ∂q; ∂k

besides one fill of ∂q with zeros where it is fresh. The plan of a batch takes tensor operations of its own, once for
all layers.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from swim_kernels.noun_attention.triton import kernels
from swim_kernels.noun_attention.triton.plan import Plan, plan_of
from swim_kernels.noun_attention.triton.tiles import Tile, choose_tile, columns_for, fits_one_block, tile_constexprs
from swim_kernels.runtime.launch import DTYPES, get_architecture, is_interpreted, launch
from swim_kernels.structs.noun_queries import NounQueries

_LEAST_KEYS = 512  # of a split
_GRADIENT_PROGRAMS = 80  # over which ∂q partials are spread; more of them would write more partials
_BLOCK_ITEMS = 128  # of the kernels that combine partials


def noun_attention_triton(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None
) -> Tensor:
    """Head-averaged attention maps [R, N] fp32; arguments as `noun_attention`, already checked, not float64.

    Keeps query, key, lse and the plan for backward, no copies. No double backward. A row with an empty softmax range
    gives zeros.
    """
    plan = _plan(query, key, queries)
    if lse is None:
        lse = log_sum_exp(query.detach(), key.detach(), plan, scale)
    return maps_of(query, key, lse.detach().contiguous(), plan, scale)


def maps_given_lse(query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor) -> Tensor:
    """Maps [R, N] from lse [R, Hq], without a graph."""
    return maps_of(query.detach(), key.detach(), lse.contiguous(), _plan(query, key, queries), scale)


def deltas(
    grad_maps: Tensor, query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """δ [R, Hq] of the gradient of the maps [R, N], and the weights of the keys, for `add_gradients`."""
    return deltas_of(grad_maps, query, key, lse.contiguous(), _plan(query, key, queries), scale)


def add_gradients(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_maps: Tensor,
    query: Tensor,
    key: Tensor,
    queries: NounQueries,
    scale: float,
    lse: Tensor,
    weights: Tensor | None = None,
) -> None:
    """Adds ∂q and ∂k of the maps to tensors like query and key, in place; as in `torch_backend.py`."""
    plan = _plan(query, key, queries)
    add_gradients_of(grad_query, grad_key, grad_maps, query, key, lse.contiguous(), weights, plan, scale)


def _plan(query: Tensor, key: Tensor, queries: NounQueries) -> list[Tensor]:
    batch, num_heads, length, head_dim = query.shape
    heads = _block_heads(num_heads // key.shape[1])
    block_rows = columns_for("maps", len(queries), heads, head_dim, DTYPES[query.dtype]) // heads
    return list(plan_of(queries, batch, length, block_rows))


@torch.library.custom_op("swim_kernels::noun_attention_lse", mutates_args=())
def log_sum_exp(query: Tensor, key: Tensor, plan: list[Tensor], scale: float) -> Tensor:
    """lse [R, Hq] fp32"""
    tables = Plan(*plan)
    num_rows, num_heads = len(tables.entries), query.shape[1]
    lse = query.new_empty(num_rows, num_heads, dtype=torch.float32)
    if not _anything(tables):
        return lse.zero_()
    run = _Run(query, key, num_rows)
    tile = run.tile("lse_partials")
    num_splits, tiles = _splits(key.shape[2], tile.block_keys, most=64)
    maxima, sums = lse.new_empty(2, num_splits, num_rows, num_heads)
    run.launch(
        "lse_partials",
        (num_splits, key.shape[1], len(tables.blocks)),
        (query, key, tables.entries, tables.blocks, maxima, sums),
        (scale, query.shape[2], num_rows, num_heads, run.group, tiles),
        (*query.stride(), *key.stride()),
    )
    grid = (triton.cdiv(lse.numel(), _BLOCK_ITEMS),)
    launch(kernels.lse_combine_kernel, grid, maxima, sums, lse, lse.numel(), num_splits, BLOCK=_BLOCK_ITEMS)
    return lse


@torch.library.custom_op("swim_kernels::noun_attention_maps", mutates_args=())
def maps_of(query: Tensor, key: Tensor, lse: Tensor, plan: list[Tensor], scale: float) -> Tensor:
    """a [R, N] fp32 from a contiguous lse [R, Hq]"""
    tables = Plan(*plan)
    num_rows, num_columns = len(tables.entries), tables.key_sets.shape[1]
    maps = query.new_empty(num_rows, num_columns, dtype=torch.float32)
    if not _anything(tables):
        return maps
    run = _Run(query, key, num_rows)
    run.launch(
        "maps",
        (triton.cdiv(num_columns, run.tile("maps").block_keys), len(tables.read_blocks)),
        (query, key, lse, tables.entries, tables.read_blocks, tables.key_sets, maps),
        (scale, num_rows, query.shape[1], key.shape[1], run.group, num_columns),
        (*query.stride(), *key.stride()),
    )
    return maps


@torch.library.custom_op("swim_kernels::noun_attention_gradients", mutates_args=())
def gradients_of(
    grad_maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    plan: list[Tensor],
    scale: float,
    want_query: bool,
    want_key: bool,
) -> tuple[Tensor, Tensor]:
    """∂q and ∂k in the dtype and, if they are dense, the strides of query and key; empty if unwanted."""
    tables = Plan(*plan)
    if not _anything(tables):
        return (
            torch.zeros_like(query) if want_query else query.new_empty(0),
            torch.zeros_like(key) if want_key else key.new_empty(0),
        )
    run = _Gradients(grad_maps, query, key, lse, tables, scale, add=False)
    grad_query = torch.zeros_like(query) if want_query else None
    grad_key = torch.empty_like(key) if want_key else None  # every element is written
    run.write(grad_query, grad_key, *run.delta_partials())
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in (grad_query, grad_key))


@torch.library.custom_op("swim_kernels::noun_attention_deltas", mutates_args=())
def deltas_of(
    grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, plan: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """δ [R, Hq] fp32 and the weights [R, N] of the columns"""
    tables = Plan(*plan)
    if not _anything(tables):
        return torch.zeros_like(lse), lse.new_zeros(len(lse), tables.key_sets.shape[1])
    run = _Gradients(grad_maps, query, key, lse, tables, scale, add=False)
    partials, weights = run.delta_partials()
    return run.sum_deltas(partials)[0], weights


@torch.library.custom_op("swim_kernels::noun_attention_add_gradients", mutates_args=("grad_query", "grad_key"))
def add_gradients_of(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    weights: Tensor | None,
    plan: list[Tensor],
    scale: float,
) -> None:
    """∂q and ∂k added to what is there. With weights, without δ."""
    tables = Plan(*plan)
    if not _anything(tables):
        return
    run = _Gradients(grad_maps, query, key, lse, tables, scale, add=True)
    partials, weights = run.delta_partials() if weights is None else (torch.zeros_like(lse)[None], weights)
    run.write(grad_query, grad_key, partials, weights)


@log_sum_exp.register_fake
def _(query, key, plan, scale):
    return query.new_empty(plan[0].shape[0], query.shape[1], dtype=torch.float32)


@maps_of.register_fake
def _(query, key, lse, plan, scale):
    return query.new_empty(plan[0].shape[0], Plan(*plan).key_sets.shape[1], dtype=torch.float32)


@deltas_of.register_fake
def _(grad_maps, query, key, lse, plan, scale):
    return torch.empty_like(lse), lse.new_empty(lse.shape[0], Plan(*plan).key_sets.shape[1])


@add_gradients_of.register_fake
def _(grad_query, grad_key, grad_maps, query, key, lse, weights, plan, scale):
    return None


@gradients_of.register_fake
def _(grad_maps, query, key, lse, plan, scale, want_query, want_key):
    return (
        torch.empty_like(query) if want_query else query.new_empty(0),
        torch.empty_like(key) if want_key else key.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    query, key, lse, plan, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, lse, *plan)
    ctx.scale = scale


def _backward(ctx, grad_maps):
    query, key, lse, *plan = ctx.saved_tensors
    nothing = [None] * len(plan)
    if grad_maps is None:
        return None, None, None, nothing, None
    want_query, want_key = ctx.needs_input_grad[:2]
    grad_query, grad_key = gradients_of(grad_maps, query, key, lse, plan, ctx.scale, want_query, want_key)
    return grad_query if want_query else None, grad_key if want_key else None, None, nothing, None


maps_of.register_autograd(_backward, setup_context=_setup_context)


class _Run:
    """What the launches on one query and key have in common."""

    def __init__(self, query: Tensor, key: Tensor, num_rows: int, add: bool = False) -> None:
        self.query = query
        self.num_rows = num_rows
        self.add = add
        self.head_dim = query.shape[3]
        self.group = query.shape[1] // key.shape[1]
        self.block_heads = _block_heads(self.group)
        self.dtype = DTYPES[query.dtype]
        self.architecture = get_architecture(query.device)

    def tile(self, kernel: str) -> Tile:
        return choose_tile(kernel, self.num_rows, self.block_heads, self.head_dim, self.dtype, self.architecture)

    def fits_one_block(self) -> bool:
        return fits_one_block(self.num_rows, self.block_heads, self.head_dim, self.dtype, self.architecture)

    def launch(self, kernel: str, grid: tuple[int, ...], tensors: tuple, numbers: tuple, strides: tuple) -> None:
        tile = self.tile(kernel)
        function = getattr(kernels, f"{'gradients' if kernel.endswith('gradients') else kernel}_kernel")
        values = tile_constexprs(kernel, self.head_dim, tile, self.add) | {"UPCAST": is_interpreted(function)}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        launch(function, grid, *tensors, *numbers, *strides, **values, **options)


class _Gradients(_Run):
    """Backward. Besides ∂q and ∂k it allocates, in fp32, partials of δ [splits, R, Hq] and ∂q [splits, R, Hq, D] and
    the weights of the keys that are read out [R, N]."""

    def __init__(
        self, grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, tables: Plan, scale: float, add: bool
    ) -> None:
        super().__init__(query, key, len(tables.entries), add)
        self.grad_maps, self.key, self.lse, self.tables, self.scale = grad_maps, key, lse, tables, scale

    def write(self, grad_query: Tensor | None, grad_key: Tensor | None, deltas: Tensor, weights: Tensor) -> None:
        """∂q and ∂k, where they are given; the rows' tokens alone of ∂q."""
        if grad_query is not None and grad_key is not None and self.fits_one_block():
            partials = self.pass_over_keys("gradients", self.tables.sequences, weights, deltas, grad_key)
            self.sum_query_gradient(partials, grad_query)
            return
        if len(deltas) > 1:
            deltas = self.sum_deltas(deltas)
        if grad_query is not None:
            partials = self.pass_over_keys("query_gradients", self.tables.blocks, weights, deltas, None)
            self.sum_query_gradient(partials, grad_query)
        if grad_key is not None:
            self.pass_over_keys("key_gradients", self.tables.sequences, weights, deltas, grad_key)

    def delta_partials(self) -> tuple[Tensor, Tensor]:
        """δ partials and the weights of the keys."""
        num_heads, num_columns = self.query.shape[1], self.tables.key_sets.shape[1]
        num_splits, tiles = _splits(num_columns, self.tile("delta_partials").block_keys, most=32)
        deltas = self.lse.new_empty(num_splits, self.num_rows, num_heads)
        weights = self.lse.new_empty(self.num_rows, num_columns)
        tables = self.tables
        self.launch(
            "delta_partials",
            (num_splits, self.key.shape[1], len(tables.read_blocks)),
            (self.query, self.key, self.lse, self.grad_maps, tables.entries, tables.read_blocks, tables.key_sets)
            + (tables.next_column, tables.repeats, deltas, weights),
            (self.scale, self.num_rows, num_heads, self.group, num_columns, tiles),
            (*self.query.stride(), *self.key.stride(), *self.grad_maps.stride()),
        )
        return deltas, weights

    def sum_deltas(self, partials: Tensor) -> Tensor:
        deltas = partials.new_empty(1, *partials.shape[1:])
        grid = (triton.cdiv(deltas.numel(), _BLOCK_ITEMS),)
        launch(kernels.delta_sum_kernel, grid, partials, deltas, deltas.numel(), len(partials), BLOCK=_BLOCK_ITEMS)
        return deltas

    def pass_over_keys(
        self, kernel: str, blocks: Tensor, weights: Tensor, deltas: Tensor, grad_key: Tensor | None
    ) -> Tensor:
        """Fills ∂k if it is given; returns the partials of ∂q [splits, R, Hq, D], empty for "key_gradients"."""
        tile = self.tile(kernel)
        _, num_key_heads, length, _ = self.key.shape
        if kernel == "key_gradients":
            num_splits, tiles = _splits(length, tile.block_keys, most=length)
            partials = self.lse.new_empty(0)
        else:
            row_blocks = triton.cdiv(self.num_rows, tile.block_rows)
            most = max(1, _GRADIENT_PROGRAMS // (num_key_heads * row_blocks))
            num_splits, tiles = _splits(length, tile.block_keys, most)
            partials = self.lse.new_empty(num_splits, self.num_rows, *self.query.shape[1::2])
        tables = self.tables
        grad_strides = (0, 0, 0, 1) if grad_key is None else grad_key.stride()
        self.launch(
            kernel,
            (num_splits, num_key_heads, len(blocks)),
            (self.query, self.key, self.lse, weights, deltas, tables.entries, blocks, tables.inverse)
            + (partials, self.key if grad_key is None else grad_key),
            (self.scale, length, self.num_rows, self.query.shape[1], self.group, tables.key_sets.shape[1])
            + (len(deltas), tiles),
            (*self.query.stride(), *self.key.stride(), *grad_strides),
        )
        return partials

    def sum_query_gradient(self, partials: Tensor, grad_query: Tensor) -> None:
        num_splits, num_rows, num_heads, head_dim = partials.shape
        launch(
            kernels.query_gradient_kernel,
            (num_rows, num_heads),
            partials,
            self.tables.entries,
            grad_query,
            num_rows,
            num_heads,
            num_splits,
            *grad_query.stride(),
            HEAD_DIM=head_dim,
            BLOCK_DIM=triton.next_power_of_2(head_dim),
            BLOCK_SPLITS=8,
            ADD=self.add,
        )


def _splits(length: int, block_keys: int, most: int) -> tuple[int, int]:
    """How many splits, from shapes only, and how many tiles has each."""
    tiles = triton.cdiv(length, block_keys)
    per_split = triton.cdiv(tiles, max(1, min(triton.cdiv(length, _LEAST_KEYS), most)))
    return triton.cdiv(tiles, per_split), per_split


def _block_heads(group: int) -> int:
    return triton.next_power_of_2(group)


def _anything(tables: Plan) -> bool:
    return tables.entries.shape[0] > 0 and tables.key_sets.shape[1] > 0
