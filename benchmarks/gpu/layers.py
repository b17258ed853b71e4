"""Rows and losses of one supervised layer, and the launches of its kernels, to be made again one by one."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from benchmarks.attention_loss.inputs import Geometry
from swim_fast.loss.mask_loss import MaskTargets, mask_alignment_loss
from swim_kernels import NounQueries

LAUNCHERS = ("attention_rows", "grid_prediction", "mask_bce")
TINY = Geometry(
    num_heads=4, num_key_heads=2, head_dim=16, num_layers=2, supervised=2, patches=2, text=20, mask_size=(20, 36)
)


@dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel, to be made again."""

    name: str
    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, object]

    def repeat(self) -> None:
        self.kernel[self.grid](**self.arguments)


@contextmanager
def record_launches(interpreted: bool = False) -> Iterator[list[Launch]]:
    """Record every launch of our kernels, in order; they are made as well.

    interpreted: Triton's interpreter is what `auto` chooses.
    """
    from swim_kernels.runtime.backends import Op
    from swim_kernels.runtime.launch import launch

    seen: list[Launch] = []

    def recorded(kernel, grid, **arguments):
        seen.append(Launch(kernel.fn.__name__.removesuffix("_kernel"), kernel, grid, arguments))
        launch(kernel, grid, **arguments)

    modules = [importlib.import_module(f"swim_kernels.{name}.triton.launch") for name in LAUNCHERS]
    patches = [mock.patch.object(module, "launch", recorded) for module in modules]
    if interpreted:
        patches.append(mock.patch.object(Op, "choose", lambda *_: "triton"))
    for patch in patches:
        patch.start()
    try:
        yield seen
    finally:
        for patch in patches:
            patch.stop()


def count_keys(queries: NounQueries) -> tuple[int, int]:
    """Return the keys that any row is read out on, and those that any softmax reaches."""
    read_out = int(queries.key_sets.unique().ge(0).sum())
    if queries.over == "set":
        return read_out, read_out
    return read_out, int(queries.key_end.max() - queries.key_start.min())


def floor_bytes(launch: Launch, queries: NounQueries) -> int:
    """Return the least bytes that a launch must move: every needed element of its tensors once.

    Of query and ∂query only the rows' tokens count, of key and ∂key the keys that the rows read out or whose softmax
    reaches them; of all else every element.
    """
    total = 0
    for name, value in launch.arguments.items():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor):
                total += _needed_elements(name, tensor, launch, queries) * tensor.element_size()
    return total


def _needed_elements(name: str, tensor: Tensor, launch: Launch, queries: NounQueries) -> int:
    if name not in ("query", "grad_query", "key", "grad_key"):
        return tensor.numel()
    _, num_heads, length, head_dim = tensor.shape
    if name in ("query", "grad_query"):
        return min(len(queries), length) * num_heads * head_dim
    read_out, reached = count_keys(queries)
    if name == "grad_key" and not launch.arguments.get("ADD"):
        return tensor.numel()
    keys = read_out if launch.name in ("maps", "delta_partials") else reached
    return keys * num_heads * head_dim * (2 if name == "grad_key" else 1)


def random_rows(num_rows: int, length: int, patches: bool, seed: int, device: str) -> NounQueries:
    """Return rows at random tokens behind a video of 16 patches that fills 9/10 of the sequence."""
    generator = torch.Generator().manual_seed(seed)
    cells = max(length * 9 // 10 // 16, 1)
    keys = torch.arange(16 * cells)
    position = torch.randint(16 * cells, length, (num_rows,), generator=generator)
    zeros = torch.zeros_like(position)
    if not patches:
        return NounQueries(zeros, position, zeros, position + 1, zeros, keys[None]).to(device)
    patch = torch.randint(16, (num_rows,), generator=generator)
    sets = keys.view(16, cells)
    return NounQueries(zeros, position, sets[patch, 0], sets[patch, -1] + 1, patch, sets, over="set").to(device)


def random_loss(maps: Tensor, queries: NounQueries, mask_size: tuple[int, int]) -> Tensor:
    """Return the mask loss of maps [R, N] of rows over patches, each of which has a grid of one row of cells."""
    num_rows, cells = maps.shape
    height = next(h for h in range(math.isqrt(cells), 0, -1) if cells % h == 0)
    row, sizes = torch.arange(num_rows), [torch.full((num_rows,), size) for size in (height, cells // height)]
    masks = [torch.ones(mask_size, dtype=torch.uint8)]
    targets = MaskTargets(row, torch.zeros_like(row), *sizes, torch.zeros_like(row), masks)
    return mask_alignment_loss([maps], replace(targets).to(maps.device))
