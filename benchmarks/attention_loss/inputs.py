"""Inputs of one training step: a video of 16 temporal patches, all supervised, and 300 text tokens, R of them nouns.

Only what the attention loss touches is there: hidden states, query, key and value of every decoder layer, the gradient
that arrives at its attention output, noun queries and mask targets.
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
from swim_kernels.flash_noun_attention.providers.torch import TorchCpu, TorchCuda

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

    @property
    def width(self) -> int:
        """Size of the hidden states."""
        return self.num_heads * self.head_dim

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
        sources: (hidden [L, C], weights of the query [Hq · D, C] and of the key [Hkv · D, C]) from which `project`
            makes a layer's query and key.
        rotation: cosines and sines of the rotary embedding, [L, D] each.
        grad_output: [1, Hq, L, D], gradient that arrives at each layer's attention output.
        queries, targets: a row for each noun, read out on the video; made anew for each run by `fresh`, as every batch
            brings its own; the masks are bit-packed.
        patch_queries, patch_targets: the same with a row for each noun and patch, whose softmax is over the patch.
        masks: the same masks, unpacked, for a loss in plain operations.
        attention: the flash attention.
    """

    geometry: Geometry
    grid: tuple[int, int]
    layers: Layers
    sources: Layers
    rotation: tuple[Tensor, Tensor]
    grad_output: Tensor
    queries: NounQueries
    targets: MaskTargets
    patch_queries: NounQueries
    patch_targets: MaskTargets
    masks: Sequence[Tensor]
    attention: Provider = field(default_factory=TorchCpu)

    @property
    def length(self) -> int:
        return self.grad_output.shape[2]

    @property
    def call(self) -> Call:
        return Call(self.geometry.head_dim**-0.5)

    def fresh(self) -> Step:
        """Return the step with queries and targets for which nothing is cached yet.

        On a GPU they know what a move from the CPU tells them, such as the sizes of the grids.
        """
        device = self.grad_output.device
        names = ("queries", "patch_queries", "targets", "patch_targets")
        parts = {name: getattr(self, name) for name in names}
        renew = replace if device.type == "cpu" else (lambda part: part.to(device))
        return replace(self, **{name: renew(part) for name, part in parts.items()})

    def cast(self, dtype: torch.dtype) -> Step:
        layers, sources = (
            [tuple(t.to(dtype) for t in layer) for layer in part] for part in (self.layers, self.sources)
        )
        rotation = tuple(tensor.to(dtype) for tensor in self.rotation)
        grad_output = self.grad_output.to(dtype)
        return replace(self, layers=layers, sources=sources, rotation=rotation, grad_output=grad_output)

    def with_rows(self, num_rows: int) -> Step:
        return replace(self, **_supervise(self.length, num_rows, self.geometry, self.grid, self.grad_output.device))

    def tensors(self) -> list[Tensor]:
        """Return all tensors that exist before the step."""
        replayed = self.attention.tensors() if isinstance(self.attention, Replayed) else ()
        layers = [tensor for layer in [*self.layers, *self.sources] for tensor in layer]
        supervision = list(self.masks)
        for queries, targets in ((self.queries, self.targets), (self.patch_queries, self.patch_targets)):
            packed = targets.packed
            supervision += [*queries.tensors(), *indices_of(targets), packed.bits, packed.table]
        return [*layers, *self.rotation, self.grad_output, *replayed, *supervision]


def indices_of(targets: MaskTargets) -> tuple[Tensor, ...]:
    """Return row, start, height, width and mask of the pairs, [P] each."""
    return targets.row, targets.start, targets.height, targets.width, targets.mask


def project(hidden: Tensor, weight: Tensor, rotation: tuple[Tensor, Tensor], head_dim: int) -> Tensor:
    """Return a query or key [heads, tokens, D] of hidden states [tokens, C], after rotary embedding."""
    heads = (hidden @ weight.mT).unflatten(-1, (-1, head_dim)).transpose(0, 1)
    first, second = heads.chunk(2, dim=-1)
    cos, sin = rotation
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


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
    length: int,
    num_rows: int,
    geometry: Geometry | None = None,
    *,
    dtype=torch.bfloat16,
    distinct=1,
    seed=0,
    device: torch.device | str = "cpu",
) -> Step:
    """Return a step of random inputs; `distinct` layers have tensors of their own, the others share the last one's."""
    geometry, device = geometry or Geometry(), torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def make_layer():
        hidden = random(length, geometry.width)
        weights = [random(n * geometry.head_dim, geometry.width) for n in (geometry.num_heads, geometry.num_key_heads)]
        weights = [weight / geometry.width**0.5 for weight in weights]
        query, key = (project(hidden, weight, rotation, geometry.head_dim)[None].contiguous() for weight in weights)
        value = random(1, geometry.num_key_heads, length, geometry.head_dim)
        return (query, key, value), (hidden, *weights)

    angle = torch.arange(length)[:, None] * 1e6 ** -(torch.arange(0, geometry.head_dim, 2) / geometry.head_dim)
    rotation = tuple(f(angle).repeat(1, 2).to(device, dtype) for f in (torch.cos, torch.sin))
    made = [make_layer() for _ in range(distinct)]
    made += made[-1:] * (geometry.num_layers - distinct)
    layers, sources = zip(*made, strict=True)
    grad_output = random(1, geometry.num_heads, length, geometry.head_dim)
    grid = geometry.grid(length)
    supervision = _supervise(length, num_rows, geometry, grid, device)
    attention = TorchCuda() if device.type == "cuda" else TorchCpu()
    return Step(geometry, grid, layers, sources, rotation, grad_output, **supervision, attention=attention)


def _supervise(
    length: int, num_rows: int, geometry: Geometry, grid: tuple[int, int], device: torch.device
) -> dict[str, object]:
    """Return queries, targets and masks of a step: every row with every patch, an object's rows share masks."""
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
    packed = PackedMasks.pack(masks)
    targets = MaskTargets(row, patch * math.prod(grid), height, width, mask, packed)

    by_patch, zeros = video.view(geometry.patches, -1), torch.zeros_like(row)
    start, end = by_patch[patch, 0], by_patch[patch, -1] + 1
    patch_queries = NounQueries(zeros, position[row], start, end, patch, by_patch, over="set")
    patch_targets = MaskTargets(torch.arange(len(row)), zeros, height, width, mask, packed)
    parts = {"queries": queries, "targets": targets, "patch_queries": patch_queries, "patch_targets": patch_targets}
    parts = {name: part.to(device) for name, part in parts.items()}
    return parts | {"masks": [mask.to(device) for mask in masks]}


def _ellipse(geometry: Geometry, index: int, time: int) -> Tensor:
    """Return the mask of an object that moves from left to right, bool [Hm, Wm]."""
    height, width = geometry.mask_size
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)
    center_y = 0.3 + 0.4 * math.sin(index) ** 2
    center_x = 0.2 + 0.6 * time / geometry.patches
    return ((y - center_y) / 0.2) ** 2 + ((x - center_x) / 0.1) ** 2 < 1
