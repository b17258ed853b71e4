"""The public op: checks its arguments and dispatches to a backend."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from swim_kernels.attention_rows.arguments import check_arguments, op_properties, refuse_triton
from swim_kernels.noun_attention.reference import noun_attention_eager
from swim_kernels.noun_attention.torch_backend import noun_attention_torch
from swim_kernels.runtime.backends import Op
from swim_kernels.structs.noun_queries import NounQueries

HEADS = ("mean", "each")


def _import_triton() -> Callable[..., Tensor]:
    from swim_kernels.noun_attention.triton.launch import noun_attention_triton

    return noun_attention_triton


OP = Op(
    "noun attention",
    eager=noun_attention_eager,
    torch=noun_attention_torch,
    import_triton=_import_triton,
    refuse=refuse_triton,
)


def noun_attention(
    query: Tensor,
    key: Tensor,
    queries: NounQueries,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    heads: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Attention probabilities of a few query tokens on chosen keys, averaged over heads or of each, differentiable.

    The full softmax of each row over its range of keys, as in attention itself (Vaswani et al. 2017, eq. 1), read out
    on the row's key set, and averaged over the query heads or not; equations in `reference.py`, the specification.
    Gradients flow to `query` at the rows' tokens and to every key of the rows' ranges.

    Args:
        query: [B, Hq, L, D] bf16, fp16, fp32 or fp64, after rotary embedding; any strides.
        key: [B, Hkv, L, D] of the same dtype; Hq a multiple of Hkv; query head h uses key head h // (Hq / Hkv).
        queries: the R rows and the key sets they are read out on, on the same device. On the CPU their values are
            checked too; on an accelerator nothing is read back: check them before they move (`NounQueries.check`).
        scale: factor on the scores; D ** -0.5 if not given.
        lse: [R, Hq], if the attention has already computed it: natural logarithm of Σ_j exp(scaled score) over the
            row's range, for row r of `queries` and query head h; fp32 (fp64 for fp64 inputs). It must belong to the
            same scale and range. A constant: it gets no gradient, and ∂query, ∂key are those of the full softmax all
            the same.
        heads: "mean", a map for all query heads, or "each", one for each of them: what a loss of single heads needs, or
            one that weighs heads (then `(weights[:, :, None] * maps).sum(1)`, differentiable in both). It takes Hq
            times the memory: for a handful of rows.
        backend: "eager" (the reference, materialises everything), "torch" (chunked, recomputes in backward, any
            device), "triton" (CUDA, or CPU tensors in Triton's interpreter; not fp64, D at most 256, Hq / Hkv at most
            16), or "auto": triton on CUDA where it can run, else torch.

    Returns:
        [R, N], or [R, Hq, N] of each head, fp32 (fp64 for fp64 inputs); 0 where the key set is padded and where the key
        is outside the row's range.
        With no rows or no keys the result is empty, and backward gives zeros.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes, devices or values that do not go together; an unknown backend or kind of heads.
        RuntimeError: a backend that is not available here.
    """
    check_arguments(query, key, queries, scale, lse)
    check_heads(heads)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return OP(backend, query.device.type, op_properties(query, key), query, key, queries, scale, lse, heads)


def check_heads(heads: str) -> None:
    """Raise ValueError unless `heads` is one of `HEADS`."""
    if heads not in HEADS:
        raise ValueError(f"unknown heads {heads!r}: choose one of {', '.join(HEADS)}")
