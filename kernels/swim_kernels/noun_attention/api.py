"""The public op: checks its arguments and dispatches to a backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from swim_kernels.noun_attention.reference import noun_attention_eager
from swim_kernels.noun_attention.torch_backend import noun_attention_torch
from swim_kernels.noun_attention.triton.tiles import MAX_GROUP, MAX_HEAD_DIM
from swim_kernels.runtime.backends import Op
from swim_kernels.runtime.numerics import check_floating, compute_dtype
from swim_kernels.structs.noun_queries import NounQueries


def _import_triton() -> Callable[..., Tensor]:
    from swim_kernels.noun_attention.triton.launch import noun_attention_triton

    return noun_attention_triton


def _refuse_triton(dtype: torch.dtype = torch.bfloat16, group: int = 1, head_dim: int = 128) -> str | None:
    if dtype == torch.float64:
        return "it has no float64"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is above {MAX_HEAD_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads share a key head, at most {MAX_GROUP} can"
    return None


OP = Op(
    "noun attention",
    eager=noun_attention_eager,
    torch=noun_attention_torch,
    import_triton=_import_triton,
    refuse=_refuse_triton,
)


def noun_attention(
    query: Tensor,
    key: Tensor,
    queries: NounQueries,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention probabilities of a few query tokens on chosen keys, averaged over heads, differentiable.

    The full softmax of each row over its range of keys, as in attention itself (Vaswani et al. 2017, eq. 1), read out
    on the row's key set and averaged over the query heads; equations in `reference.py`, which is the specification.
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
        backend: "eager" (the reference, materialises everything), "torch" (chunked, recomputes in backward, any
            device), "triton" (CUDA, or CPU tensors in Triton's interpreter; not fp64, D at most 256, Hq / Hkv at most
            16), or "auto": triton on CUDA where it can run, else torch.

    Returns:
        [R, N] fp32 (fp64 for fp64 inputs); 0 where the key set is padded and where the key is outside the row's range.
        With no rows or no keys the result is empty, and backward gives zeros.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes, devices or values that do not go together; an unknown backend.
        RuntimeError: a backend that is not available here.
    """
    check_arguments(query, key, queries, scale, lse)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return OP(backend, query.device.type, op_properties(query, key), query, key, queries, scale, lse)


def op_properties(query: Tensor, key: Tensor) -> tuple[torch.dtype, int, int]:
    """Return what the choice of a backend depends on, besides the device."""
    return query.dtype, query.shape[1] // key.shape[1], query.shape[3]


def check_arguments(query: Tensor, key: Tensor, queries: NounQueries, scale: float | None, lse: Tensor | None) -> None:
    """Check all that can be known without waiting for the device; on the CPU the values of `queries` as well."""
    for name, tensor, layout in (("query", query, "[B, Hq, L, D]"), ("key", key, "[B, Hkv, L, D]")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be {layout}, got shape {list(tensor.shape)}")
    if not isinstance(queries, NounQueries):
        raise TypeError(f"queries must be a NounQueries, got {type(queries).__name__}")
    check_floating("query", query)
    if key.dtype != query.dtype:
        raise TypeError(f"query is {query.dtype}, key is {key.dtype}: cast one of them")
    if key.device != query.device:
        raise ValueError(f"query is on {query.device}, key on {key.device}")
    if queries.device != query.device:
        raise ValueError(f"query is on {query.device}, queries on {queries.device}: move them with queries.to(device)")

    batch, num_heads, length, head_dim = query.shape
    num_key_heads = key.shape[1]
    for axis, size, name in ((0, batch, "batch"), (2, length, "length"), (3, head_dim, "head_dim")):
        if key.shape[axis] != size:
            raise ValueError(
                f"query and key differ in {name}, {size} and {key.shape[axis]}: "
                f"shapes {list(query.shape)} and {list(key.shape)}"
            )
    if not num_heads or not num_key_heads or not head_dim:
        raise ValueError(f"no heads or no head_dim: query {list(query.shape)}, key {list(key.shape)}")
    if num_heads % num_key_heads:
        raise ValueError(f"{num_heads} query heads cannot be shared by {num_key_heads} key heads: not a multiple")

    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a Python number, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
    if lse is not None:
        if not isinstance(lse, Tensor):
            raise TypeError(f"lse must be a tensor [R, Hq], got {type(lse).__name__}")
        if lse.shape != (len(queries), num_heads):
            raise ValueError(f"lse must be [R, Hq] = {[len(queries), num_heads]}, got shape {list(lse.shape)}")
        if lse.dtype != compute_dtype(query.dtype):
            raise TypeError(
                f"lse must be {compute_dtype(query.dtype)} for {query.dtype} query and key, got {lse.dtype}"
            )
        if lse.device != query.device:
            raise ValueError(f"query is on {query.device}, lse on {lse.device}")
    if queries.device.type == "cpu" and not torch.compiler.is_compiling():
        queries.check(batch, length)
