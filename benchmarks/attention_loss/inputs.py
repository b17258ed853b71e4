"""Inputs of one training step: a video of 16 temporal patches, all supervised, and 300 text tokens, R of them nouns.

Only what the attention loss touches is there: query, key and value of every decoder layer, the gradient that arrives
at its attention output, noun queries and mask targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from swim_fast.loss.mask_loss import MaskTargets
from swim_kernels import NounQueries, PackedMasks
from swim_kernels.flash_noun_attention.providers.base import Call, Provider
from swim_kernels.flash_noun_attention.providers.torch import TorchCpu

AT = (16384, 8)  # tokens and rows of the targets
Layers = Sequence[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Geometry:
    """Sizes that do not depend on the length; by default a 7B model's, with 32 frames of 720p."""

    num_heads: int = 28
    num_key_heads: int = 4
    head_dim: int = 128
    num_layers: int = 28
    supervised: int = 6  # layers
    patches: int = 16  # temporal
    text: int = 300  # tokens after the video
    mask_size: tuple[int, int] = (720, 1280)
    rows_per_object: int = 4

    def grid(self, length: int) -> tuple[int, int]:
        """Return (h, w) of a patch: the largest grid of about the masks' shape with which video and text fit."""
        cells = (length - self.text) // self.patches
        shape = self.mask_size[0] / self.mask_size[1]
        fitting = [(cells // w, w) for w in range(1, cells + 1) if 0.8 * shape <= cells // w / w <= 1.25 * shape]
        return max(fitting, key=lambda grid: (grid[0] * grid[1], grid[0]))


@dataclass(frozen=True)
class Step:
    """Inputs of one step.

    Attributes:
        grid: (h, w) of every patch.
        layers: (query, key, value) of each layer, [1, Hq or Hkv, L, D]; layers may share them.
        grad_output: [1, Hq, L, D], gradient that arrives at each layer's attention output.
        queries, targets: made anew for each run by `fresh`, as every batch brings its own; the masks are bit-packed.
        masks: the same masks, unpacked, for a loss in plain operations.
        attention: the flash attention.
    """

    geometry: Geometry
    grid: tuple[int, int]
    layers: Layers
    grad_output: Tensor
    queries: NounQueries
    targets: MaskTargets
    masks: Sequence[Tensor]
    attention: Provider = field(default_factory=TorchCpu)

    @property
    def length(self) -> int:
        return self.grad_output.shape[2]

    @property
    def call(self) -> Call:
        return Call(self.geometry.head_dim**-0.5)

    def fresh(self) -> Step:
        """Return the step with queries and targets for which nothing is cached yet."""
        targets = MaskTargets(*self.indices(), self.targets.masks)
        return replace(self, queries=NounQueries(*self.queries.tensors()), targets=targets)

    def cast(self, dtype: torch.dtype) -> Step:
        layers = [tuple(tensor.to(dtype) for tensor in layer) for layer in self.layers]
        return replace(self, layers=layers, grad_output=self.grad_output.to(dtype))

    def with_rows(self, num_rows: int) -> Step:
        return replace(self, **_supervise(self.length, num_rows, self.geometry, self.grid))

    def indices(self) -> tuple[Tensor, ...]:
        """Return row, start, height, width and mask of the pairs, [P] each."""
        targets = self.targets
        return targets.row, targets.start, targets.height, targets.width, targets.mask

    def tensors(self) -> list[Tensor]:
        """Return all tensors that exist before the step."""
        packed = self.targets.packed
        replayed = self.attention.tensors() if isinstance(self.attention, Replayed) else ()
        layers = [tensor for layer in self.layers for tensor in layer]
        supervision = [*self.queries.tensors(), *self.indices(), packed.bits, packed.table, *self.masks]
        return [*layers, self.grad_output, *replayed, *supervision]


class Replayed(Provider):
    """A flash attention of one layer that hands out again what it computed once, so that it costs a run nothing.

    The caller adds to the gradients it gets, so they change from run to run: they are good for timing only.
    """

    name = "replayed"

    def __init__(self, attention: Provider):
        self._attention = attention

    def compute(self, step: Step) -> None:
        query, key, value = step.layers[0]
        self._forward = tuple(self._attention.forward(query, key, value, step.call))
        self._gradients = self._attention.backward(step.grad_output, query, key, value, self._forward, step.call)

    def tensors(self) -> tuple[Tensor, ...]:
        return *self._forward, *self._gradients

    def check(self, query, key, value, call):
        pass

    def forward(self, query, key, value, call):
        return tuple(tensor.detach() for tensor in self._forward)

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        return tuple(tensor.detach() for tensor in self._gradients)


def make_step(
    length: int, num_rows: int, geometry: Geometry | None = None, *, dtype=torch.bfloat16, distinct=1, seed=0
) -> Step:
    """Return a step of random inputs; `distinct` layers have tensors of their own, the others share the last one's."""
    geometry = geometry or Geometry()
    generator = torch.Generator().manual_seed(seed)

    def random(num_heads):
        return torch.randn(1, num_heads, length, geometry.head_dim, generator=generator).to(dtype)

    heads = (geometry.num_heads, geometry.num_key_heads, geometry.num_key_heads)
    layers = [tuple(map(random, heads)) for _ in range(distinct)]
    layers += layers[-1:] * (geometry.num_layers - distinct)
    grad_output = random(geometry.num_heads)
    grid = geometry.grid(length)
    return Step(geometry, grid, layers, grad_output, **_supervise(length, num_rows, geometry, grid))


def _supervise(length: int, num_rows: int, geometry: Geometry, grid: tuple[int, int]) -> dict[str, object]:
    """Return `queries`, `targets` and `masks` of a step: every row with every patch, an object's rows share masks."""
    first = length - geometry.text
    position = first + (torch.arange(num_rows) + 1) * geometry.text // (num_rows + 1)  # spread over the text
    zeros = torch.zeros_like(position)
    video = torch.arange(first - geometry.patches * math.prod(grid), first)[None]
    queries = NounQueries(zeros, position, zeros, position + 1, zeros, video)

    objects = range(-(-num_rows // geometry.rows_per_object))
    masks = [_ellipse(geometry, index, time) for index in objects for time in range(geometry.patches)]
    row = torch.arange(num_rows).repeat_interleave(geometry.patches)
    patch = torch.arange(geometry.patches).repeat(num_rows)
    height, width = (torch.full_like(row, size) for size in grid)
    mask = row // geometry.rows_per_object * geometry.patches + patch
    targets = MaskTargets(row, patch * math.prod(grid), height, width, mask, PackedMasks.pack(masks))
    return {"queries": queries, "targets": targets, "masks": masks}


def _ellipse(geometry: Geometry, index: int, time: int) -> Tensor:
    """Return the mask of an object that moves from left to right, bool [Hm, Wm]."""
    height, width = geometry.mask_size
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)
    center_y = 0.3 + 0.4 * math.sin(index) ** 2
    center_x = 0.2 + 0.6 * time / geometry.patches
    return ((y - center_y) / 0.2) ** 2 + ((x - center_x) / 0.1) ** 2 < 1
