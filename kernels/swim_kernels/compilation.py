"""Compilation of the Triton kernels of a run before it needs them."""

from __future__ import annotations

import logging
import threading
import time

import torch

from swim_kernels.flash_noun_attention import Unsupported, flash_noun_attention
from swim_kernels.grid_prediction import grid_metrics, grid_prediction
from swim_kernels.mask_bce import mask_bce
from swim_kernels.noun_attention import NounQueries, noun_attention
from swim_kernels.noun_mass import noun_mass
from swim_kernels.structs.grid_pairs import GridPairs
from swim_kernels.structs.packed_masks import PackedMasks

logger = logging.getLogger(__name__)

_LENGTH, _COLUMNS, _GRID = 512, 256, (16, 8)  # enough for several splits; two patches of a row
_ROWS = [2**power for power in range(9)]  # some for every tile


def compile_in_background(device: torch.device | str = "cuda", **run) -> threading.Thread:
    """Start to compile the kernels of a run for a GPU, and return the thread that does it.

    Launches elsewhere wait for a kernel that is just being compiled. The log tells of the start, the end and an
    exception, which ends this thread alone: what is missing then is compiled at its first launch.

    Args:
        run: as of `run_ops`.
    """
    thread = threading.Thread(target=_compile, args=(torch.device(device), run), name="compilation of Triton kernels")
    thread.start()
    return thread


def _compile(device: torch.device, run: dict) -> None:
    logger.info("compiling Triton kernels in the background")
    start = time.perf_counter()
    try:
        from swim_kernels.runtime.launch import compile_only

        # the backward of this thread in this thread
        with torch.cuda.device(device), torch.autograd.set_multithreading_enabled(False), compile_only() as builds:
            for num_rows in _ROWS:
                run_ops(num_rows, device, **run)
        logger.info("compiled %d kernels in %.0f s", len(builds), time.perf_counter() - start)
    except Exception:
        logger.warning("kernels could not be compiled ahead: each will be at its first launch", exc_info=True)


def run_ops(
    num_rows: int,
    device: torch.device,
    *,
    num_heads: int,
    num_key_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    fused: bool = True,
    over: str = "set",
    num_layers: int = 6,
    fusion: str = "mean",
    prediction: str | None = "probability",
    with_masks: bool = True,
    with_sets: bool = False,
    backend: str = "auto",
) -> None:
    """Run a small batch forward and backward through the ops that a training step calls.

    Args:
        num_rows: of the maps.
        num_heads, num_key_heads, head_dim, dtype: of query and key.
        fused: attention output and maps come from one node, if that can be.
        over: keys of the softmax of the maps, as in `NounQueries`; those of ranges are causal.
        num_layers: layers whose maps are fused.
        fusion, prediction: of `grid_prediction`; None: it is not called.
        with_masks: the prediction is compared with masks by `mask_bce`.
        with_sets: causal rows have their attention to sets of keys summed by `noun_mass`.
        backend: of all ops.
    """
    query, key, value = (
        torch.zeros(1, _LENGTH, heads, head_dim, dtype=dtype, device=device, requires_grad=True).transpose(1, 2)
        for heads in (num_heads, num_key_heads, num_key_heads)
    )
    first = torch.zeros(num_rows, dtype=torch.int64)
    last = torch.full_like(first, _LENGTH - 1)
    columns = torch.arange(_COLUMNS)[None]
    queries = NounQueries(first, last, first, last + 1, first, columns, over=over).to(device)
    try:
        if not fused:
            raise Unsupported("asked for")
        output, maps = flash_noun_attention(query, key, value, queries, backend=backend)
        outputs = output.sum()
    except Unsupported:
        maps, outputs = noun_attention(query, key, queries, backend=backend), 0

    starts = torch.tensor([0, _COLUMNS // 2])
    pairs = GridPairs.from_rows(torch.zeros_like(starts), starts, [_GRID] * 2, torch.zeros_like(starts)).to(device)
    layers, losses = [maps] * num_layers, [maps.sum() + outputs]
    if with_sets:
        causal = NounQueries(first, last, first, last + 1, first, columns[:, :0]).to(device)
        losses.append(noun_mass(query, key, causal, columns[None].to(device), backend=backend).sum())
    how = {"fusion": fusion, "backend": backend}
    if prediction is not None:
        cells = grid_prediction(layers, pairs, prediction=prediction, **how)
        losses.append(cells.sum())
        if with_masks:
            masks = PackedMasks.pack([torch.ones(32, 32, dtype=torch.uint8)]).to(device)
            losses += [mask_bce(wanted, pairs, masks, backend=backend).sum() for wanted in (cells, cells.detach())]
    grid_metrics(layers, pairs, *torch.ones(2, pairs.num_cells, device=device), **how)
    sum(losses).backward()
