"""Noun mass in Triton: launches of the kernels, registered as operators of torch.

    masses, and lse unless it is handed over    2 launches
    ∂q and ∂k, few rows                         2: ∂q partials and ∂k in one pass over K; ∂q
    ∂q and ∂k, more than fit one tile,          3: ∂q partials; ∂q; ∂k
    or with a softmax over key sets

besides one fill of ∂q with zeros, and two operations for δ. Plan and table of the sets are made once for all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swim_kernels.attention_rows.triton.launch import LEAST_TILES, Layer, combine, fake_gradients, plan_tables
from swim_kernels.noun_mass.triton import kernels
from swim_kernels.noun_mass.triton.members import members_of
from swim_kernels.structs.noun_queries import NounQueries


def noun_mass_triton(
    query: Tensor, key: Tensor, queries: NounQueries, sets: Tensor, scale: float, lse: Tensor | None = None
) -> Tensor:
    """Return masses [R, Hq, S] fp32; arguments as `noun_mass`, already checked, not float64.

    Keeps query, key, lse, the masses, the plan and the table of the sets for backward, no copies. No double backward. A
    row without a key in its softmax gives zeros.
    """
    plan = plan_tables(query, key, queries)
    members = members_of(sets, key.shape[2])
    lse = None if lse is None else lse.detach().contiguous()
    return masses_of(query, key, lse, plan, members, sets.shape[1], scale, queries.over == "set")[0]


# no default: torch 2.11 counts no argument that equals its default, and then finds one gradient too many
@torch.library.custom_op("swim_kernels::noun_mass", mutates_args=())
def masses_of(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    plan: list[Tensor],
    members: Tensor,
    num_sets: int,
    scale: float,
    over_set: bool,
) -> tuple[Tensor, Tensor]:
    """Return m [R, Hq, S] fp32 and lse [R, Hq], which is empty if it is given."""
    given = lse is not None
    layer = Layer(query, key, plan, scale, over_set=over_set, members=members)
    shape = layer.num_rows, layer.num_heads
    masses = query.new_empty(*shape, num_sets, dtype=torch.float32)
    found = masses.new_empty(0 if given else shape)
    if not masses.numel():
        return masses, found.zero_()
    num_splits = layer.count_splits("mass_partials", layer.length, LEAST_TILES)
    maxima, sums = masses.new_empty(2, num_splits, *shape)
    parts = masses.new_empty(num_splits, *masses.shape)
    blocks = layer.plan.read_blocks
    arguments = {"lse": lse if given else found, "maxima": maxima, "sums": sums, "parts": parts}
    arguments |= {"num_sets": num_sets, "given": int(given)}
    layer.launch(
        kernels.mass_partials_kernel, (num_splits, layer.num_key_heads, len(blocks)), blocks=blocks, **arguments
    )
    combine(kernels.mass_combine_kernel, maxima[0].numel(), num_splits, masses=masses, **arguments)
    return masses, found


@torch.library.custom_op("swim_kernels::noun_mass_gradients", mutates_args=())
def gradients_of(
    grad_masses: Tensor,
    masses: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    plan: list[Tensor],
    members: Tensor,
    scale: float,
    want_query: bool,
    want_key: bool,
    over_set: bool,
) -> tuple[Tensor, Tensor]:
    """Return ∂q and ∂k in the dtype and, if they are dense, the strides of query and key; empty if unwanted."""
    layer = Layer(query, key, plan, scale, lse, over_set, "mass", members)

    def find() -> tuple[Tensor, Tensor]:
        return (masses * grad_masses).sum(dim=-1)[None], grad_masses.contiguous()

    return layer.fresh_gradients(want_query, want_key, not masses.numel(), find)


@masses_of.register_fake
def _(query, key, lse, plan, members, num_sets, scale, over_set):
    shape = plan[0].shape[0], query.shape[1]
    masses = query.new_empty(*shape, num_sets, dtype=torch.float32)
    return masses, masses.new_empty(shape if lse is None else 0)


@gradients_of.register_fake
def _(grad_masses, masses, query, key, lse, plan, members, scale, want_query, want_key, over_set):
    return fake_gradients(query, key, want_query, want_key)


def _setup_context(ctx, inputs, output):
    query, key, lse, plan, members, _, scale, over_set = inputs
    masses, found = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, found if lse is None else lse, masses, members, *plan)
    ctx.scale, ctx.over_set = scale, over_set


def _backward(ctx, grad_masses, _):
    query, key, lse, masses, members, *plan = ctx.saved_tensors
    nothing = (None, [None] * len(plan), None, None, None, None)
    if grad_masses is None:
        return None, None, *nothing
    want_query, want_key = ctx.needs_input_grad[:2]
    how = (ctx.scale, want_query, want_key, ctx.over_set)
    grad_query, grad_key = gradients_of(grad_masses, masses, query, key, lse, plan, members, *how)
    return grad_query if want_query else None, grad_key if want_key else None, *nothing


masses_of.register_autograd(_backward, setup_context=_setup_context)
