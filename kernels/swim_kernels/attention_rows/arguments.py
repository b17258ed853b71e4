"""Check the arguments of the ops on attention rows, and collect what their backends are chosen by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swim_kernels.attention_rows.triton.tiles import MAX_GROUP, MAX_HEAD_DIM
from swim_kernels.runtime.numerics import check_floating, compute_dtype
from swim_kernels.structs.noun_queries import NounQueries


def refuse_triton(dtype: torch.dtype = torch.bfloat16, group: int = 1, head_dim: int = 128) -> str | None:
    """Return why the Triton kernels cannot take inputs with these properties, None if they can."""
    if dtype == torch.float64:
        return "it has no float64"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is above {MAX_HEAD_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads share a key head, at most {MAX_GROUP} can"
    return None


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
