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

from swim_kernels.attention_rows.triton.launch import LEAST_TILES, Layer, combine, fake_gradients, plan_tables
from swim_kernels.attention_rows.triton.plan import Plan
from swim_kernels.noun_attention.triton import kernels
from swim_kernels.structs.noun_queries import NounQueries


def noun_attention_triton(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None, heads: str = "mean"
) -> Tensor:
    """Return attention maps [R, N] or [R, Hq, N] fp32; arguments as `noun_attention`, already checked, not float64.

    Keeps query, key, lse and the plan for backward, no copies. No double backward. A row without a key in its softmax
    gives zeros.
    """
    return _maps_and_lse(query, key, queries, scale, lse, heads)[0]


def maps_and_lse(
    query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor | None = None, heads: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Return maps [R, N] or [R, Hq, N] and lse [R, Hq], which is computed unless it is handed over, without a graph."""
    return _maps_and_lse(query.detach(), key.detach(), queries, scale, lse, heads)


def _maps_and_lse(query, key, queries, scale, lse, heads):
    plan, over_set = plan_tables(query, key, queries), queries.over == "set"
    if lse is None:
        lse = log_sum_exp(query.detach(), key.detach(), plan, scale, over_set)
    lse = lse.detach().contiguous()
    return maps_of(query, key, lse, plan, scale, over_set, heads == "each"), lse


def deltas(
    grad_maps: Tensor, query: Tensor, key: Tensor, queries: NounQueries, scale: float, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """δ [R, Hq] of the gradient of the maps, and the weights of the keys, for `add_gradients`."""
    return deltas_of(grad_maps, query, key, lse.contiguous(), plan_tables(query, key, queries), scale)


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
    plan, over_set = plan_tables(query, key, queries), queries.over == "set"
    add_gradients_of(grad_query, grad_key, grad_maps, query, key, lse.contiguous(), weights, plan, scale, over_set)


@torch.library.custom_op("swim_kernels::noun_attention_lse", mutates_args=())
def log_sum_exp(query: Tensor, key: Tensor, plan: list[Tensor], scale: float, over_set: bool) -> Tensor:
    """Return lse [R, Hq] fp32."""
    layer = Layer(query, key, plan, scale, over_set=over_set)
    lse = query.new_empty(layer.num_rows, layer.num_heads, dtype=torch.float32)
    if _is_empty(plan):
        return lse.zero_()
    num_splits = layer.count_splits("lse_partials", layer.num_columns if over_set else layer.length, LEAST_TILES)
    maxima, sums = lse.new_empty(2, num_splits, *lse.shape)
    blocks = layer.plan.blocks
    grid = (num_splits, layer.num_key_heads, len(blocks))
    layer.launch(kernels.lse_partials_kernel, grid, blocks=blocks, maxima=maxima, sums=sums)
    combine(kernels.lse_combine_kernel, lse.numel(), num_splits, maxima=maxima, sums=sums, lse=lse)
    return lse


# no default: torch 2.11 counts no argument that equals its default, and then finds one gradient too many
@torch.library.custom_op("swim_kernels::noun_attention_maps", mutates_args=())
def maps_of(
    query: Tensor, key: Tensor, lse: Tensor, plan: list[Tensor], scale: float, over_set: bool, each: bool
) -> Tensor:
    """Return a [R, N] fp32, with `each` [R, Hq, N], from a contiguous lse [R, Hq]."""
    layer = Layer(query, key, plan, scale, lse, readout="each" if each else "mean")
    maps = lse.new_empty(_shape_of_maps(lse, plan, each))
    if _is_empty(plan):
        return maps
    blocks = layer.plan.read_blocks
    grid = (triton.cdiv(layer.num_columns, layer.tile("maps").block_keys), len(blocks))
    layer.launch(kernels.maps_kernel, grid, blocks=blocks, maps=maps)
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
    layer = Layer(query, key, plan, scale, lse, over_set, _readout(grad_maps))
    return layer.fresh_gradients(want_query, want_key, _is_empty(plan), lambda: _delta_partials(layer, grad_maps))


@torch.library.custom_op("swim_kernels::noun_attention_deltas", mutates_args=())
def deltas_of(
    grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, plan: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Return δ [R, Hq] fp32 and the weights of the columns, [R, N] or [R, Hq, N]."""
    layer = Layer(query, key, plan, scale, lse, readout=_readout(grad_maps))
    if _is_empty(plan):
        return torch.zeros_like(lse), grad_maps.new_zeros(grad_maps.shape, dtype=lse.dtype)
    partials, weights = _delta_partials(layer, grad_maps)
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
    layer = Layer(query, key, plan, scale, lse, over_set, _readout(grad_maps))
    if _is_empty(plan):
        return
    if weights is None:
        partials, weights = _delta_partials(layer, grad_maps)
    else:
        partials = torch.zeros_like(lse)[None]
    layer.write_gradients(grad_query, grad_key, partials, weights, add=True)


def _is_empty(plan: list[Tensor]) -> bool:
    tables = Plan(*plan)
    return not len(tables.entries) or not tables.key_sets.shape[1]


def _readout(grad_maps: Tensor) -> str:
    return "each" if grad_maps.ndim == 3 else "mean"


def _shape_of_maps(lse: Tensor, plan: list[Tensor], each: bool) -> tuple[int, ...]:
    num_rows, num_heads = lse.shape
    num_columns = Plan(*plan).key_sets.shape[1]
    return (num_rows, num_heads, num_columns) if each else (num_rows, num_columns)


def _delta_partials(layer: Layer, grad_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return δ partials [splits, R, Hq] and the weights of the keys that are read out, [R, N] or [R, Hq, N], fp32."""
    if grad_maps.ndim == 3 or grad_maps.stride(1) != 1:
        grad_maps = grad_maps.contiguous()  # expanded, as that of a sum
    stride = grad_maps.stride(0)
    if grad_maps.ndim == 3:  # not stride(1), which is anything where there is one head
        stride = grad_maps.shape[2]
    num_splits = layer.count_splits("delta_partials", layer.num_columns, LEAST_TILES)
    deltas = grad_maps.new_empty(num_splits, layer.num_rows, layer.num_heads, dtype=torch.float32)
    weights = deltas.new_empty(grad_maps.shape)
    blocks = layer.plan.read_blocks
    grid = (num_splits, layer.num_key_heads, len(blocks))
    inputs = {"grad_maps": grad_maps, "grad_maps_stride": stride, "blocks": blocks}
    layer.launch(kernels.delta_partials_kernel, grid, **inputs, deltas=deltas, weights=weights)
    return deltas, weights


@log_sum_exp.register_fake
def _(query, key, plan, scale, over_set):
    return query.new_empty(plan[0].shape[0], query.shape[1], dtype=torch.float32)


@maps_of.register_fake
def _(query, key, lse, plan, scale, over_set, each):
    return lse.new_empty(_shape_of_maps(lse, plan, each))


@deltas_of.register_fake
def _(grad_maps, query, key, lse, plan, scale):
    return torch.empty_like(lse), lse.new_empty(grad_maps.shape)


@add_gradients_of.register_fake
def _(grad_query, grad_key, grad_maps, query, key, lse, weights, plan, scale, over_set):
    return None


@gradients_of.register_fake
def _(grad_maps, query, key, lse, plan, scale, want_query, want_key, over_set):
    return fake_gradients(query, key, want_query, want_key)


def _setup_context(ctx, inputs, output):
    query, key, lse, plan, scale, over_set, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, lse, *plan)
    ctx.scale, ctx.over_set = scale, over_set


def _backward(ctx, grad_maps):
    query, key, lse, *plan = ctx.saved_tensors
    nothing = (None, [None] * len(plan), None, None, None)
    if grad_maps is None:
        return None, None, *nothing
    want_query, want_key = ctx.needs_input_grad[:2]
    wanted = want_query, want_key
    grad_query, grad_key = gradients_of(grad_maps, query, key, lse, plan, ctx.scale, *wanted, ctx.over_set)
    return grad_query if want_query else None, grad_key if want_key else None, *nothing


maps_of.register_autograd(_backward, setup_context=_setup_context)
