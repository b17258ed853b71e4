"""Stand-ins for flash attention libraries that need a GPU: the published signatures, computed plainly on the CPU.

flash-attn 2.8.3 (`flash_attn/flash_attn_interface.py`), flash-attn-3 (`hopper/flash_attn_interface.py`), flash-attn-4
4.0.0b36 (`flash_attn/cute/interface.py`) and the operators of torch. Backward functions that fill the caller's buffers
overwrite what is there, as the libraries do.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale, left, cu_seqlens):
    """Causal attention of [B, L, H, D], packed [T, H, D]: output in that layout, lse [B, H, L] or [H, T]."""
    packed = cu_seqlens is not None
    q, k, v = (x[None] if packed else x for x in (q, k, v))
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance >= 0
    if left is not None and left >= 0:
        seen &= distance <= left
    if packed:
        segment = torch.searchsorted(cu_seqlens, torch.arange(length, dtype=cu_seqlens.dtype), right=True)
        seen &= segment[:, None] == segment
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    s = (scale * torch.einsum("bihd,bjhd->bhij", q, k)).masked_fill(~seen, float("-inf"))
    lse = s.logsumexp(-1)
    output = torch.einsum("bhij,bjhd->bihd", (s - lse[..., None]).exp(), v)
    return (output[0], lse[0]) if packed else (output, lse)


def gradients(dout, q, k, v, out, lse, scale, left, cu_seqlens, dlse=None):
    """∂q, ∂k, ∂v; out and lse must be those of the forward."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        again = attention(q, k, v, scale, left, cu_seqlens)
        for given, own in zip((out, lse), again, strict=True):
            torch.testing.assert_close(given, own.detach())
        total = (again[0] * dout).sum() + (0 if dlse is None else (again[1] * dlse).sum())
        return torch.autograd.grad(total, (q, k, v))


def _fill(buffers, values):
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def flash_attn_2() -> types.SimpleNamespace:
    """Module `flash_attn.flash_attn_interface`"""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert causal and dropout_p == softcap == 0 and alibi_slopes is None and not return_softmax
        output, lse = attention(q, k, v, softmax_scale, window_size_left, None)
        return output, lse, torch.empty(0), torch.tensor([7, 9])

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert causal and dropout_p == softcap == 0
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max() and cu_seqlens_k is cu_seqlens_q
        output, lse = attention(q, k, v, softmax_scale, window_size_left, cu_seqlens_q)
        return output, lse, torch.empty(0), torch.tensor([7, 9])

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert causal and dropout_p == softcap == 0 and rng_state.tolist() == [7, 9]
        _fill((dq, dk, dv), gradients(dout, q, k, v, out, softmax_lse, softmax_scale, window_size_left, None))
        return torch.empty(0)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert causal and dropout_p == softcap == 0 and rng_state.tolist() == [7, 9]
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max() and cu_seqlens_k is cu_seqlens_q
        _fill((dq, dk, dv), gradients(dout, q, k, v, out, softmax_lse, softmax_scale, window_size_left, cu_seqlens_q))
        return torch.empty(0)

    return _module(locals())


def flash_attn_3() -> types.SimpleNamespace:
    """Module `flash_attn_interface`"""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        assert causal
        output, lse = attention(q, k, v, softmax_scale, window_size_left, cu_seqlens_q)
        return output, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert is_causal
        _fill((dq, dk, dv), gradients(dout, q, k, v, out, softmax_lse, softmax_scale, window_size_left, cu_seqlens_q))
        return torch.empty(0)

    return _module(locals())


def flash_attn_3_older() -> types.SimpleNamespace:
    """The same module of an earlier release: other names, the window as a pair."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
        causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        assert causal
        return *attention(q, k, v, softmax_scale, window_size[0], cu_seqlens_q), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq,
        dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert causal
        values = gradients(dout, q, k, v, out, softmax_lse, softmax_scale, window_size[0], cu_seqlens_q)
        _fill((dq, dk, dv), values)
        return dq, dk, dv, None

    return _module(locals())


def flash_attn_4() -> types.SimpleNamespace:
    """Module `flash_attn.cute.interface`"""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
        q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        assert causal and return_lse
        return *attention(q, k, v, softmax_scale, window_size_left, cu_seqlens_q), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
        learnable_sink=None,
    ):  # fmt: skip
        assert causal
        assert dlse is None or (dlse.shape == lse.shape and dlse.is_contiguous())
        values = gradients(dout, q, k, v, out, lse, softmax_scale, window_size_left, cu_seqlens_q, dlse)
        _fill((dq, dk, dv), values)
        return dq, dk, dv

    return _module(locals())


def aten() -> types.SimpleNamespace:
    """`torch.ops.aten` with the operators that need CUDA."""

    def _flash_attention_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
        num_splits=None,
    ):  # fmt: skip
        assert is_causal and not return_debug_mask and dropout_p == 0 and cum_seq_k is cum_seq_q
        assert max_q == max_k == (query.shape[1] if cum_seq_q is None else cum_seq_q.diff().max())
        output, lse = attention(query, key, value, scale, window_size_left, cum_seq_q)
        return output, lse, torch.tensor([7, 9]), torch.tensor([3]), torch.empty(0)

    def _flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert is_causal and dropout_p == 0 and rng_state.tolist() == [7, 9] and unused.tolist() == [3]
        assert max_q == max_k == (query.shape[1] if cum_seq_q is None else cum_seq_q.diff().max())
        return gradients(grad_out, query, key, value, out, logsumexp, scale, window_size_left, cum_seq_q)

    def _scaled_dot_product_cudnn_attention(
        query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
        scale=None,
    ):  # fmt: skip
        assert attn_bias is None and compute_log_sumexp and dropout_p == 0 and is_causal and not return_debug_mask
        output, lse = attention(*(x.transpose(1, 2) for x in (query, key, value)), scale, None, None)
        length = query.shape[2]
        seed, offset = torch.tensor(7), torch.tensor(9)
        return output.transpose(1, 2), lse[..., None], None, None, length, length, seed, offset, None

    def _scaled_dot_product_cudnn_attention_backward(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
        max_k, dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        assert attn_bias is cum_seq_q is cum_seq_k is None and max_q == max_k == query.shape[2]
        assert (philox_seed, philox_offset, dropout_p, is_causal) == (7, 9, 0, True)
        tensors = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        found = gradients(*tensors, logsumexp.squeeze(-1), scale, None, None)
        return tuple(x.transpose(1, 2) for x in found)

    return _module(locals())


def _module(functions: dict) -> types.SimpleNamespace:
    return types.SimpleNamespace(**functions)
