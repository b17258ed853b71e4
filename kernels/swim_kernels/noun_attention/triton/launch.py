"""Noun attention in Triton: launches of the kernels in `kernels.py`, registered as operators of torch.

Operators that are opaque to `torch.compile` and to CUDA graph capture: lse, maps from lse, and the gradients of the
maps, fresh or added to those of a flash attention. Nothing is read back from the device and nothing depends on values,
so the same launches serve every batch of a shape:

    lse, unless it is handed over         2 launches
    maps                                  1
    ∂q and ∂k, few rows                   3: δ partials; ∂q partials and ∂k in one pass over K; ∂q
    ∂q and ∂k, more than fit one tile,    5: δ partials, δ; ∂q partials; ∂q; ∂k
    or with a softmax over key sets

besides one fill of ∂q with zeros where it is fresh. The plan of a batch takes two more and a copy, once for all layers,
where the rows came from the CPU; see `plan.py`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from swim_kernels.attention_rows.triton.plan import Plan, plan_of
from swim_kernels.attention_rows.triton.tiles import (
    Tile,
    choose_tile,
    columns_for,
    pad_group,
    tile_constexprs,
)
from swim_kernels.noun_attention.triton import kernels
from swim_kernels.runtime.launch import (
    DTYPES,
    choose_splits,
    count_processors,
    get_architecture,
    is_interpreted,
    launch,
)
from swim_kernels.structs.noun_queries import NounQueries

_LEAST_TILES = 2  # of a split of lse and δ
_LEAST_KEYS = 512  # of a split of ∂q, whose partials are large
_FEW_BYTES = 16  # a second program of ∂q on a processor where partials have at most 1/16 of the bytes of K
_BLOCK_ITEMS = 128  # of the kernels that combine partials


def noun_attention_triton(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None
) -> Tensor:
    """Return head-averaged attention maps [R, N] fp32; arguments as `noun_attention`, already checked, not float64.

    Keeps query, key, lse and the plan for backward, no copies. No double backward. A row without a key in its softmax
    gives zeros.
    """
    return _maps_and_lse(query, key, queries, scale, lse)[0]


def maps_and_lse(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return maps [R, N] and lse [R, Hq], which is computed unless it is handed over, without a graph."""
    return _maps_and_lse(query.detach(), key.detach(), queries, scale, lse)


def _maps_and_lse(query, key, queries, scale, lse):
    plan, over_set = _plan(query, key, queries), queries.over == "set"
    if lse is None:
        lse = log_sum_exp(query.detach(), key.detach(), plan, scale, over_set)
    lse = lse.detach().contiguous()
    return maps_of(query, key, lse, plan, scale, over_set), lse


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
    """Add ∂q and ∂k of the maps to tensors like query and key, in place; as in `torch_backend.py`."""
    plan, over_set = _plan(query, key, queries), queries.over == "set"
    add_gradients_of(grad_query, grad_key, grad_maps, query, key, lse.contiguous(), weights, plan, scale, over_set)


def _plan(query: Tensor, key: Tensor, queries: NounQueries) -> list[Tensor]:
    batch, num_heads, length, head_dim = query.shape
    heads = pad_group(num_heads // key.shape[1])
    block_rows = columns_for("maps", len(queries), heads, head_dim, DTYPES[query.dtype]) // heads
    return list(plan_of(queries, batch, length, block_rows))


@torch.library.custom_op("swim_kernels::noun_attention_lse", mutates_args=())
def log_sum_exp(query: Tensor, key: Tensor, plan: list[Tensor], scale: float, over_set: bool) -> Tensor:
    """Return lse [R, Hq] fp32."""
    layer = _Layer(query, key, plan, scale, over_set=over_set)
    lse = query.new_empty(layer.num_rows, layer.num_heads, dtype=torch.float32)
    if layer.is_empty:
        return lse.zero_()
    num_splits = layer.count_splits("lse_partials", layer.num_columns if over_set else layer.length, _LEAST_TILES)
    maxima, sums = lse.new_empty(2, num_splits, *lse.shape)
    blocks = layer.plan.blocks
    grid = (num_splits, layer.num_key_heads, len(blocks))
    layer.launch("lse_partials", grid, blocks=blocks, maxima=maxima, sums=sums)
    _combine(kernels.lse_combine_kernel, num_splits, maxima=maxima, sums=sums, lse=lse)
    return lse


# no default: torch 2.11 counts no argument that equals its default, and then finds one gradient too many
@torch.library.custom_op("swim_kernels::noun_attention_maps", mutates_args=())
def maps_of(query: Tensor, key: Tensor, lse: Tensor, plan: list[Tensor], scale: float, over_set: bool) -> Tensor:
    """Return a [R, N] fp32 from a contiguous lse [R, Hq]."""
    layer = _Layer(query, key, plan, scale, lse)
    maps = query.new_empty(layer.num_rows, layer.num_columns, dtype=torch.float32)
    if layer.is_empty:
        return maps
    blocks = layer.plan.read_blocks
    grid = (triton.cdiv(layer.num_columns, layer.tile("maps").block_keys), len(blocks))
    layer.launch("maps", grid, blocks=blocks, maps=maps)
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
    over_set: bool,
) -> tuple[Tensor, Tensor]:
    """Return ∂q and ∂k in the dtype and, if they are dense, the strides of query and key; empty if unwanted."""
    layer = _Layer(query, key, plan, scale, lse, over_set)
    grad_query = torch.zeros_like(query) if want_query else None
    grad_key = None
    if want_key:  # every element is written
        grad_key = torch.zeros_like(key) if layer.is_empty else torch.empty_like(key)
    if not layer.is_empty:
        layer.write_gradients(grad_query, grad_key, *layer.delta_partials(grad_maps), add=False)
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in (grad_query, grad_key))


@torch.library.custom_op("swim_kernels::noun_attention_deltas", mutates_args=())
def deltas_of(
    grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, plan: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Return δ [R, Hq] fp32 and the weights [R, N] of the columns."""
    layer = _Layer(query, key, plan, scale, lse)
    if layer.is_empty:
        return torch.zeros_like(lse), lse.new_zeros(len(lse), layer.num_columns)
    partials, weights = layer.delta_partials(grad_maps)
    return layer.sum_deltas(partials)[0], weights


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
    over_set: bool,
) -> None:
    """Add ∂q and ∂k to what is there. With weights, without δ."""
    layer = _Layer(query, key, plan, scale, lse, over_set)
    if layer.is_empty:
        return
    partials, weights = layer.delta_partials(grad_maps) if weights is None else (torch.zeros_like(lse)[None], weights)
    layer.write_gradients(grad_query, grad_key, partials, weights, add=True)


@log_sum_exp.register_fake
def _(query, key, plan, scale, over_set):
    return query.new_empty(plan[0].shape[0], query.shape[1], dtype=torch.float32)


@maps_of.register_fake
def _(query, key, lse, plan, scale, over_set):
    return query.new_empty(plan[0].shape[0], Plan(*plan).key_sets.shape[1], dtype=torch.float32)


@deltas_of.register_fake
def _(grad_maps, query, key, lse, plan, scale):
    return torch.empty_like(lse), lse.new_empty(lse.shape[0], Plan(*plan).key_sets.shape[1])


@add_gradients_of.register_fake
def _(grad_query, grad_key, grad_maps, query, key, lse, weights, plan, scale, over_set):
    return None


@gradients_of.register_fake
def _(grad_maps, query, key, lse, plan, scale, want_query, want_key, over_set):
    return (
        torch.empty_like(query) if want_query else query.new_empty(0),
        torch.empty_like(key) if want_key else key.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    query, key, lse, plan, scale, over_set = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, lse, *plan)
    ctx.scale, ctx.over_set = scale, over_set


def _backward(ctx, grad_maps):
    query, key, lse, *plan = ctx.saved_tensors
    nothing = (None, [None] * len(plan), None, None)
    if grad_maps is None:
        return None, None, *nothing
    want_query, want_key = ctx.needs_input_grad[:2]
    wanted = want_query, want_key
    grad_query, grad_key = gradients_of(grad_maps, query, key, lse, plan, ctx.scale, *wanted, ctx.over_set)
    return grad_query if want_query else None, grad_key if want_key else None, *nothing


maps_of.register_autograd(_backward, setup_context=_setup_context)


class _Layer:
    """The launches on one query and key, which hand to a kernel what it takes of `arguments`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        plan: list[Tensor],
        scale: float,
        lse: Tensor | None = None,
        over_set: bool = False,
    ) -> None:
        self.plan, self.over_set = Plan(*plan), over_set
        self.batch, self.num_heads, self.length, self.head_dim = query.shape
        self.num_rows, self.num_columns = len(self.plan.entries), self.plan.key_sets.shape[1]
        self.num_key_heads = key.shape[1]
        self.group = self.num_heads // self.num_key_heads
        self.is_empty = not self.num_rows or not self.num_columns
        self.key, self.dtype = key, DTYPES[query.dtype]
        self.architecture, self.processors = get_architecture(query.device), count_processors(query.device)
        shape = ("length", "num_rows", "num_heads", "num_key_heads", "group", "num_columns")
        self.arguments = {name: getattr(self, name) for name in shape} | self.plan._asdict()
        self.arguments |= {"query": query, "key": key, "lse": lse, "scale": float(scale)}
        self.arguments |= {"query_strides": _strides(query), "key_strides": _strides(key)}

    def tile(self, kernel: str) -> Tile:
        heads = pad_group(self.group)
        return choose_tile(kernel, self.num_rows, heads, self.head_dim, self.dtype, self.architecture)

    def launch(self, kernel: str, grid: tuple[int, ...], add: bool = False, **arguments) -> None:
        tile = self.tile(kernel)
        function = getattr(kernels, f"{kernel}_kernel")
        known = {name: value for name, value in self.arguments.items() if name in function.arg_names}
        constexprs = tile_constexprs(kernel, self.head_dim, tile, add, self.over_set)
        constexprs["UPCAST"] = is_interpreted(function)
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        launch(function, grid, **known | arguments | constexprs | options)

    def delta_partials(self, grad_maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return δ partials [splits, R, Hq] and the weights [R, N] of the keys that are read out, fp32."""
        if grad_maps.stride(1) != 1:
            grad_maps = grad_maps.contiguous()  # expanded, as that of a sum
        num_splits = self.count_splits("delta_partials", self.num_columns, _LEAST_TILES)
        deltas = grad_maps.new_empty(num_splits, self.num_rows, self.num_heads, dtype=torch.float32)
        weights = deltas.new_empty(self.num_rows, self.num_columns)
        blocks = self.plan.read_blocks
        grid = (num_splits, self.num_key_heads, len(blocks))
        inputs = {"grad_maps": grad_maps, "grad_maps_stride": grad_maps.stride(0), "blocks": blocks}
        self.launch("delta_partials", grid, **inputs, deltas=deltas, weights=weights)
        return deltas, weights

    def sum_deltas(self, partials: Tensor) -> Tensor:
        deltas = partials.new_empty(1, *partials.shape[1:])
        _combine(kernels.delta_sum_kernel, len(partials), partials=partials, deltas=deltas)
        return deltas

    def write_gradients(
        self, grad_query: Tensor | None, grad_key: Tensor | None, deltas: Tensor, weights: Tensor, add: bool
    ) -> None:
        """Write ∂q, of the rows' tokens alone, and ∂k, where they are given."""
        tile = self.tile("gradients")
        both = grad_query is not None and grad_key is not None
        if both and self.num_rows <= tile.block_rows and not self.over_set:
            partials = self.pass_over_keys("gradients", self.plan.sequences, deltas, weights, grad_key, add)
            self.sum_query_gradient(partials, grad_query, add)
            return
        if len(deltas) > 1:
            deltas = self.sum_deltas(deltas)
        if grad_query is not None:
            partials = self.pass_over_keys("query_gradients", self.plan.blocks, deltas, weights)
            self.sum_query_gradient(partials, grad_query, add)
        if grad_key is not None:
            self.pass_over_keys("key_gradients", self.plan.sequences, deltas, weights, grad_key, add)

    def pass_over_keys(
        self,
        kernel: str,
        blocks: Tensor,
        deltas: Tensor,
        weights: Tensor,
        grad_key: Tensor | None = None,
        add: bool = False,
    ) -> Tensor | None:
        """Write ∂k if it is given; return the partials of ∂q [splits, R, Hq, D], None for "key_gradients"."""
        arguments = {"blocks": blocks, "deltas": deltas, "weights": weights}
        if kernel == "gradients":
            arguments["delta_splits"] = len(deltas)
        if grad_key is not None:
            arguments |= {"grad_key": grad_key, "grad_key_strides": _strides(grad_key)}
        tile, partials = self.tile(kernel), None
        if kernel == "key_gradients":
            programs = self.num_key_heads * min(self.batch, self.num_rows)  # the program of a tile does all rows
            tiles = triton.cdiv(self.length, tile.block_keys)
            num_splits = choose_splits(tiles, programs, 2 * self.processors)
        else:
            # fp32, written and read once
            bytes_per_dim = 8 * min(tile.block_rows, self.num_rows) * self.group
            ample = _FEW_BYTES * bytes_per_dim // (self.key.element_size() * tile.block_keys)
            least = triton.cdiv(_LEAST_KEYS, tile.block_keys)
            num_splits = self.count_splits(kernel, self.length, least, ample)
            partials = deltas.new_empty(num_splits, self.num_rows, self.num_heads, self.head_dim)
            arguments["grad_query_partials"] = partials
        self.launch(kernel, (num_splits, self.num_key_heads, len(blocks)), add, **arguments)
        return partials

    def count_splits(self, kernel: str, num_keys: int, least: int, ample: int = 0) -> int:
        """Return the splits of keys or columns for a kernel of which each block of rows has programs of its own."""
        tile = self.tile(kernel)
        row_blocks = max(triton.cdiv(self.num_rows, tile.block_rows), min(self.batch, self.num_rows))
        tiles = triton.cdiv(num_keys, tile.block_keys)
        return choose_splits(tiles, self.num_key_heads * row_blocks, self.processors, least, ample)

    def sum_query_gradient(self, partials: Tensor, grad_query: Tensor, add: bool) -> None:
        launch(
            kernels.query_gradient_sum_kernel,
            (self.num_rows, self.num_heads),
            partials=partials,
            entries=self.plan.entries,
            grad_query=grad_query,
            num_rows=self.num_rows,
            num_heads=self.num_heads,
            num_splits=len(partials),
            grad_query_strides=_strides(grad_query),
            HEAD_DIM=self.head_dim,
            BLOCK_DIM=triton.next_power_of_2(self.head_dim),
            BLOCK_SPLITS=8,
            ADD=add,
        )


def _combine(kernel, num_splits: int, **tensors: Tensor) -> None:
    """Launch a kernel that adds up partials [splits, …] into the last of the tensors."""
    num_items = list(tensors.values())[-1].numel()
    grid = (triton.cdiv(num_items, _BLOCK_ITEMS),)
    launch(kernel, grid, **tensors, num_items=num_items, num_splits=num_splits, BLOCK=_BLOCK_ITEMS)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides, 0 of a dimension of size 1: it may be any number there, which would ask for another build."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
