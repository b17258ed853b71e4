"""Launches of the Triton kernels on the rows of one layer, and the passes that give ∂q and ∂k.

Nothing is read back from the device and nothing depends on values, so the same launches serve every batch of a shape:

    ∂q and ∂k, few rows                   2: ∂q partials and ∂k in one pass over K; ∂q
    ∂q and ∂k, more than fit one tile,    3: ∂q partials; ∂q; ∂k, after one for δ where that comes in parts
    or with a softmax over key sets
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from swim_kernels.attention_rows.triton import kernels
from swim_kernels.attention_rows.triton.plan import Plan, plan_of
from swim_kernels.attention_rows.triton.tiles import Tile, choose_tile, columns_for, pad_group, tile_constexprs
from swim_kernels.runtime.launch import (
    DTYPES,
    choose_splits,
    count_processors,
    get_architecture,
    is_interpreted,
    launch,
)
from swim_kernels.structs.noun_queries import NounQueries

LEAST_TILES = 2  # of a split of sums: lse, δ, masses
_LEAST_KEYS = 512  # of a split of ∂q, whose partials are large
_FEW_BYTES = 16  # a second program of ∂q on a processor where partials have at most 1/16 of the bytes of K
_BLOCK_ITEMS = 128  # of the kernels that combine partials


def plan_tables(query: Tensor, key: Tensor, queries: NounQueries) -> list[Tensor]:
    """Return the plan of a batch, made at its first layer."""
    batch, num_heads, length, head_dim = query.shape
    heads = pad_group(num_heads // key.shape[1])
    block_rows = columns_for("maps", len(queries), heads, head_dim, DTYPES[query.dtype]) // heads
    return list(plan_of(queries, batch, length, block_rows))


class Layer:
    """The launches on one query and key, which hand to a kernel what it takes of `arguments`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        plan: list[Tensor],
        scale: float,
        lse: Tensor | None = None,
        over_set: bool = False,
        readout: str = "mean",
        members: Tensor | None = None,
    ) -> None:
        self.plan, self.over_set, self.readout = Plan(*plan), over_set, readout
        self.batch, self.num_heads, self.length, self.head_dim = query.shape
        self.num_rows, self.num_columns = len(self.plan.entries), self.plan.key_sets.shape[1]
        self.num_key_heads = key.shape[1]
        self.group = self.num_heads // self.num_key_heads
        self.query, self.key, self.dtype = query, key, DTYPES[query.dtype]
        self.architecture, self.processors = get_architecture(query.device), count_processors(query.device)
        shape = ("length", "num_rows", "num_heads", "num_key_heads", "group", "num_columns")
        self.arguments = {name: getattr(self, name) for name in shape} | self.plan._asdict()
        self.arguments |= {"query": query, "key": key, "lse": lse, "scale": float(scale), "members": members}
        self.arguments |= {"query_strides": strides_of(query), "key_strides": strides_of(key)}

    def tile(self, kernel: str) -> Tile:
        heads = pad_group(self.group)
        return choose_tile(kernel, self.num_rows, heads, self.head_dim, self.dtype, self.architecture)

    def launch(self, function, grid: tuple[int, ...], add: bool = False, **arguments) -> None:
        """Launch one of the kernels with a tile of keys."""
        kernel = function.fn.__name__.removesuffix("_kernel")
        tile = self.tile(kernel)
        known = {name: value for name, value in self.arguments.items() if name in function.arg_names}
        constexprs = tile_constexprs(kernel, self.head_dim, tile, add, self.over_set, self.readout)
        constexprs["UPCAST"] = is_interpreted(function)
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        launch(function, grid, **known | arguments | constexprs | options)

    def fresh_gradients(
        self, want_query: bool, want_key: bool, is_empty: bool, find: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return ∂q and ∂k in the dtype and, if they are dense, the strides of query and key; empty if unwanted.

        Args:
            is_empty: all is 0.
            find: else returns δ and the weights, as `write_gradients` takes them.
        """
        query, key = self.query, self.key
        grad_query = torch.zeros_like(query) if want_query else None
        grad_key = None
        if want_key:  # every element is written
            grad_key = torch.zeros_like(key) if is_empty else torch.empty_like(key)
        if not is_empty:
            self.write_gradients(grad_query, grad_key, *find(), add=False)
        return tuple(query.new_empty(0) if gradient is None else gradient for gradient in (grad_query, grad_key))

    def sum_deltas(self, partials: Tensor) -> Tensor:
        deltas = partials.new_empty(1, *partials.shape[1:])
        combine(kernels.delta_sum_kernel, deltas.numel(), len(partials), partials=partials, deltas=deltas)
        return deltas

    def write_gradients(
        self, grad_query: Tensor | None, grad_key: Tensor | None, deltas: Tensor, weights: Tensor, add: bool
    ) -> None:
        """Write ∂q, of the rows' tokens alone, and ∂k, where they are given.

        Args:
            deltas: δ, or partials of it, [splits, R, Hq]
            weights: [R, N], [R, Hq, N] or, of masses, [R, Hq, S], contiguous.
        """
        tile = self.tile("gradients")
        both = grad_query is not None and grad_key is not None
        if both and self.num_rows <= tile.block_rows and not self.over_set:
            partials = self.pass_over_keys(
                kernels.gradients_kernel, self.plan.sequences, deltas, weights, grad_key, add
            )
            self.sum_query_gradient(partials, grad_query, add)
            return
        if len(deltas) > 1:
            deltas = self.sum_deltas(deltas)
        if grad_query is not None:
            partials = self.pass_over_keys(kernels.query_gradients_kernel, self.plan.blocks, deltas, weights)
            self.sum_query_gradient(partials, grad_query, add)
        if grad_key is not None:
            self.pass_over_keys(kernels.key_gradients_kernel, self.plan.sequences, deltas, weights, grad_key, add)

    def pass_over_keys(
        self,
        function,
        blocks: Tensor,
        deltas: Tensor,
        weights: Tensor,
        grad_key: Tensor | None = None,
        add: bool = False,
    ) -> Tensor | None:
        """Write ∂k if it is given; return the partials of ∂q [splits, R, Hq, D], None of ∂k alone."""
        arguments = {"blocks": blocks, "deltas": deltas, "weights": weights, "num_columns": weights.shape[-1]}
        if function is kernels.gradients_kernel:
            arguments["delta_splits"] = len(deltas)
        if grad_key is not None:
            arguments |= {"grad_key": grad_key, "grad_key_strides": strides_of(grad_key)}
        kernel = function.fn.__name__.removesuffix("_kernel")
        tile, partials = self.tile(kernel), None
        if function is kernels.key_gradients_kernel:
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
        self.launch(function, (num_splits, self.num_key_heads, len(blocks)), add, **arguments)
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
            grad_query_strides=strides_of(grad_query),
            HEAD_DIM=self.head_dim,
            BLOCK_DIM=triton.next_power_of_2(self.head_dim),
            BLOCK_SPLITS=8,
            ADD=add,
        )


def fake_gradients(query: Tensor, key: Tensor, want_query: bool, want_key: bool) -> tuple[Tensor, Tensor]:
    """Return what `Layer.fresh_gradients` does, without values."""
    return (
        torch.empty_like(query) if want_query else query.new_empty(0),
        torch.empty_like(key) if want_key else key.new_empty(0),
    )


def combine(kernel, num_items: int, num_splits: int, **arguments) -> None:
    """Launch a kernel that adds up partials [splits, items, …]."""
    grid = (triton.cdiv(num_items, _BLOCK_ITEMS),)
    launch(kernel, grid, **arguments, num_items=num_items, num_splits=num_splits, BLOCK=_BLOCK_ITEMS)


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides, 0 of a dimension of size 1: it may be any number there, which would ask for another build."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
