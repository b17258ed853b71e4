"""The public op: checks its arguments and dispatches to a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swim_kernels.attention_rows.arguments import check_arguments, op_properties, refuse_triton
from swim_kernels.noun_mass.reference import noun_mass_eager
from swim_kernels.noun_mass.torch_backend import noun_mass_torch
from swim_kernels.runtime.backends import Op
from swim_kernels.structs.noun_queries import NounQueries


def _import_triton() -> Callable[..., Tensor]:
    from swim_kernels.noun_mass.triton.launch import noun_mass_triton

    return noun_mass_triton


OP = Op(
    "noun mass",
    eager=noun_mass_eager,
    torch=noun_mass_torch,
    import_triton=_import_triton,
    refuse=refuse_triton,
)


def noun_mass(
    query: Tensor,
    key: Tensor,
    queries: NounQueries,
    sets: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention probability that a few query tokens pay to sets of keys, for every head, differentiable.

    The sum of a row's softmax over the keys of a set: m[r,h,s] = exp(lse_s[r,h] − lse[r,h]) with lse_s that of the
    keys in the set; equations in `reference.py`, which is the specification. No map is formed, so that hundreds of rows
    on long sequences are cheap. Gradients flow to `query` at the rows' tokens and to every key of the rows' softmax:
    ds = p · (Σ of ∂m over the sets that the key is in − Σ of m · ∂m over all sets).

    Args:
        query: [B, Hq, L, D] bf16, fp16, fp32 or fp64, after rotary embedding; any strides.
        key: [B, Hkv, L, D] of the same dtype; Hq a multiple of Hkv; query head h uses key head h // (Hq / Hkv).
        queries: the R rows, on the same device. `key_set` picks the group of sets that a row is summed over; `key_sets`
            [G, N] is read for a softmax over key sets only: with over="range" it may be [G, 0].
        sets: int32 or int64 [G, S, M], G groups of S sets of key positions in [0, L), filled up with −1 anywhere. A
            group for every sample is the usual case, whether samples are sequences or packed into one. Sets may
            overlap and may be empty. A key that a set names several times counts once, one outside the row's softmax
            not at all. On the CPU the values are checked; on an accelerator nothing is read back.
        scale: factor on the scores; D ** -0.5 if not given.
        lse: [R, Hq], if the attention has already computed it; as for `noun_attention`, a constant.
        backend: "eager" (the reference, materialises everything), "torch" (chunked, recomputes in backward, any
            device), "triton" (CUDA, or CPU tensors in Triton's interpreter; not fp64, D at most 256, Hq / Hkv at most
            16), or "auto": triton on CUDA where it can run, else torch.

    Returns:
        [R, Hq, S] fp32 (fp64 for fp64 inputs). With no rows or no sets the result is empty, of empty sets it is 0, and
        backward gives zeros.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes, devices or values that do not go together; an unknown backend.
        RuntimeError: a backend that is not available here.
    """
    check_arguments(query, key, queries, scale, lse)
    check_sets(sets, queries, query.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return OP(backend, query.device.type, op_properties(query, key), query, key, queries, sets, scale, lse)


def check_sets(sets: Tensor, queries: NounQueries, length: int) -> None:
    """Check the sets of keys of sequences of `length` tokens; their values on the CPU only."""
    if not isinstance(sets, Tensor):
        raise TypeError(f"sets must be a tensor [G, S, M], got {type(sets).__name__}")
    if sets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sets must be int32 or int64, got {sets.dtype}")
    if sets.ndim != 3:
        raise ValueError(f"sets must be [G, S, M], got shape {list(sets.shape)}")
    if len(sets) != len(queries.key_sets):
        raise ValueError(
            f"sets has {len(sets)} groups, queries.key_sets {len(queries.key_sets)}: key_set picks a row of both"
        )
    if sets.device != queries.device:
        raise ValueError(f"sets is on {sets.device}, queries on {queries.device}")
    if sets.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (sets < -1) | (sets >= length)
        if bad.any():
            g, s, n = bad.nonzero()[0].tolist()
            raise ValueError(
                f"sets[{g}, {s}, {n}] = {sets[g, s, n].item()} is neither in [0, {length}) nor the padding -1"
            )
