"""Attention output and noun maps from one autograd node.

Forward: the flash attention, whose lse is taken over, then one pass over the keys that are read out. Where the softmax
of the rows is another than that of the attention, such as over one patch, its lse is computed here. Backward: the
flash attention's own backward, which returns or fills ∂q, ∂k and ∂v, and then, in place, the rows' part of ∂q and the
maps' part of ∂k. A node of its own would have to return another ∂q, all zeros but for a handful of rows, and another
∂k.

    ∂q += scale Σ_j ds[r,h,j] · k_j,  ∂k_j += scale Σ_{r, h of its group} ds[r,h,j] · q,  ds = p · (w − δ)

as in `noun_attention/reference.py`. A backward that takes a gradient of lse is handed −δ at the rows' tokens, since
∂lse/∂s = p: the part −p · δ, which concerns every key, is then done by it, and p · w is left, on read-out keys only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swim_kernels.runtime.numerics import add_at, no_autocast
from swim_kernels.structs.noun_queries import NounQueries


class FlashNounAttention(torch.autograd.Function):
    """Apply to query, key, value, queries, a `Call`, a `Provider`, and the module of a backend of `noun_attention`.

    own_softmax: the softmax of the rows is not the attention's.
    heads: of the maps, "mean" or "each".
    """

    @staticmethod
    def forward(ctx, query, key, value, queries, call, provider, backend, own_softmax, heads):
        ctx.set_materialize_grads(False)
        output, lse, *rest = provider.forward(query, key, value, call)
        row_lse = None if own_softmax else _of_rows(lse, queries)
        maps, row_lse = backend.maps_and_lse(query, key, queries, call.scale, row_lse, heads)
        ctx.queries, ctx.call, ctx.provider, ctx.backend = queries, call.with_tensors(None, None), provider, backend
        ctx.own_softmax = own_softmax
        ctx.save_for_backward(query, key, value, *call.tensors(), row_lse if own_softmax else None, output, lse, *rest)
        return output, maps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_maps):
        nothing = (None,) * 6
        if grad_output is None and grad_maps is None:
            return None, None, None, *nothing
        query, key, value, mask, cu_seqlens, lse, *forward = ctx.saved_tensors
        call = ctx.call.with_tensors(mask, cu_seqlens)
        arguments = (query, key, ctx.queries, call.scale)
        wanted = ctx.needs_input_grad[:3]
        with no_autocast(query.device.type):
            if lse is None and grad_maps is not None:
                lse = _of_rows(forward[1], ctx.queries)
            if grad_output is None:
                gradients = [
                    torch.zeros_like(x) if want else None for x, want in zip((query, key), wanted, strict=False)
                ]
                ctx.backend.add_gradients(*gradients, grad_maps, *arguments, lse)
                return *gradients, None, *nothing
            inputs = (_dense(grad_output), query, key, value, tuple(forward), call)
            if grad_maps is None:
                gradients = ctx.provider.backward(*inputs)
            elif ctx.provider.takes_grad_lse(query) and not ctx.own_softmax:
                deltas, weights = ctx.backend.deltas(grad_maps, *arguments, lse)
                gradients = ctx.provider.backward(*inputs, _grad_lse(deltas, forward[1], ctx.queries))
                narrow = (query, key, ctx.queries.within_key_sets(), call.scale)
                ctx.backend.add_gradients(*gradients[:2], grad_maps, *narrow, lse, weights)
            else:
                gradients = ctx.provider.backward(*inputs)
                ctx.backend.add_gradients(*gradients[:2], grad_maps, *arguments, lse)
        return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *nothing


def _of_rows(lse: Tensor, queries: NounQueries) -> Tensor:
    """[B, Hq, L] → [R, Hq]"""
    return lse[queries.sequence, :, queries.position]


def _grad_lse(deltas: Tensor, lse: Tensor, queries: NounQueries) -> Tensor:
    """−δ [R, Hq] at the rows' tokens of a zero [B, Hq, L]; the rows of one token add up."""
    batch, num_heads, length = lse.shape
    token = queries.sequence.long() * length + queries.position
    grad = lse.new_zeros(batch * length, num_heads)
    add_at(grad, token, -deltas)
    return grad.view(batch, length, num_heads).transpose(1, 2).contiguous()


def _dense(grad: Tensor) -> Tensor:
    """Expanded gradients, such as that of a sum, are written out: kernels want rows of memory."""
    return grad if grad.stride(-1) == 1 and 0 not in grad.stride() else grad.contiguous()
