"""One training step's attention loss by three methods: the set-up, the methods, and that they agree.

A video of 16 temporal patches, all supervised, is followed by 300 text tokens, R of which are tagged nouns. Of the
model only what the loss touches is there: query, key and value of each decoder layer, its flash attention, the noun
maps, the mask loss, and backward from the loss and from the attention output to query, key and value.

    this project    `flash_noun_attention` at the six supervised layers, `mask_alignment_loss`
    gathered rows   flash attention beside a plain softmax of the R gathered query rows, with autograd; a plain loss
    all text rows   as the method was published: at all layers the softmax of every text query after the video, with
                    the key heads repeated; the nouns picked out at the end; paper numerics
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from swim_fast.loss.mask_loss import MaskTargets, mask_alignment_loss
from swim_kernels import NounQueries, PackedMasks, flash_noun_attention
from swim_kernels.flash_noun_attention.providers.base import Call, Provider
from swim_kernels.flash_noun_attention.providers.torch import TorchCpu


@dataclass(frozen=True)
class Geometry:
    """What does not change with the length; the default is a 7B model on 32 frames of 720p."""

    num_heads: int = 28
    num_key_heads: int = 4
    head_dim: int = 128
    num_layers: int = 28
    supervised: int = 6  # layers
    patches: int = 16
    text: int = 300  # tokens after the video
    mask_size: tuple[int, int] = (720, 1280)
    rows_per_object: int = 4

    def grid(self, length: int) -> tuple[int, int]:
        """h x w of a patch: the largest of about the masks' shape with which video and text fit into the length."""
        cells = (length - self.text) // self.patches
        shape = self.mask_size[0] / self.mask_size[1]
        fitting = [(cells // w, w) for w in range(1, cells + 1) if 0.8 * shape <= cells // w / w <= 1.25 * shape]
        return max(fitting, key=lambda grid: (grid[0] * grid[1], grid[0]))


@dataclass(frozen=True)
class Step:
    """The inputs of one step.

    Attributes:
        layers: (query, key, value) of each layer, [1, Hq or Hkv, L, D]; layers may share them.
        grad_output: [1, Hq, L, D], the gradient that arrives at each layer's attention output.
        queries, targets: made anew for each run (`fresh`), as every batch brings its own. The masks of the targets are
            bit-packed, as batches bring them.
        masks: the same, unpacked, for a loss in plain operations.
        attention: the flash attention.
    """

    geometry: Geometry
    grid: tuple[int, int]
    layers: Sequence[tuple[Tensor, Tensor, Tensor]]
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
        """With queries and targets that nothing is remembered for yet."""
        targets = MaskTargets(*self.indices(), self.targets.masks)
        return replace(self, queries=NounQueries(*self.queries.tensors()), targets=targets)

    def indices(self) -> tuple[Tensor, ...]:
        """[P] each: row, start, height, width and mask of the pairs."""
        targets = self.targets
        return targets.row, targets.start, targets.height, targets.width, targets.mask

    def given(self) -> list[Tensor]:
        """The tensors that are there before the step."""
        packed = (self.targets.packed.bits, self.targets.packed.table)
        replayed = self.attention.tensors() if isinstance(self.attention, Replayed) else ()
        layers = [tensor for layer in self.layers for tensor in layer]
        given = [*layers, self.grad_output, *replayed, *self.queries.tensors(), *self.indices(), *packed, *self.masks]
        return given


def make_step(
    length: int, num_rows: int, geometry: Geometry | None = None, *, dtype=torch.bfloat16, distinct=1, seed=0
) -> Step:
    """Random inputs; `distinct` layers have tensors of their own, the others share those of the last."""
    geometry = geometry or Geometry()
    generator = torch.Generator().manual_seed(seed)

    def random(num_heads):
        return torch.randn(1, num_heads, length, geometry.head_dim, generator=generator).to(dtype)

    heads = (geometry.num_heads, geometry.num_key_heads, geometry.num_key_heads)
    layers = [tuple(map(random, heads)) for _ in range(distinct)]
    grid = geometry.grid(length)
    layers += layers[-1:] * (geometry.num_layers - distinct)
    grad_output = random(geometry.num_heads)
    return Step(geometry, grid, layers, grad_output, **supervision(length, num_rows, geometry, grid))


def supervision(length: int, num_rows: int, geometry: Geometry, grid: tuple[int, int]) -> dict[str, object]:
    """The fields of a `Step` that depend on the number of rows."""
    num_objects = -(-num_rows // geometry.rows_per_object)
    masks = [_ellipse(geometry, number, time) for number in range(num_objects) for time in range(geometry.patches)]
    return {
        "queries": _noun_queries(length, num_rows, geometry, grid),
        "targets": _mask_targets(num_rows, geometry, grid, masks),
        "masks": masks,
    }


def _noun_queries(length: int, num_rows: int, geometry: Geometry, grid: tuple[int, int]) -> NounQueries:
    """Tokens spread over the text, causal; read out on the video, which ends where the text begins."""
    first = length - geometry.text
    position = first + (torch.arange(num_rows) + 1) * geometry.text // (num_rows + 1)
    zeros = torch.zeros_like(position)
    video = torch.arange(first - geometry.patches * math.prod(grid), first)[None]
    return NounQueries(zeros, position, zeros, position + 1, zeros, video)


def _mask_targets(num_rows: int, geometry: Geometry, grid: tuple[int, int], masks: list[Tensor]) -> MaskTargets:
    """Every row with every patch; the rows of an object share its masks."""
    row, patch = torch.meshgrid(torch.arange(num_rows), torch.arange(geometry.patches), indexing="ij")
    row, patch = row.flatten(), patch.flatten()
    height, width = (torch.full_like(row, size) for size in grid)
    mask = row // geometry.rows_per_object * geometry.patches + patch
    return MaskTargets(row, patch * math.prod(grid), height, width, mask, PackedMasks.pack(masks))


def _ellipse(geometry: Geometry, number: int, time: int) -> Tensor:
    """The mask of an object that moves from left to right."""
    height, width = geometry.mask_size
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)
    center_y = 0.3 + 0.4 * math.sin(number) ** 2
    center_x = 0.2 + 0.6 * time / geometry.patches
    return ((y - center_y) / 0.2) ** 2 + ((x - center_x) / 0.1) ** 2 < 1


class Replayed(Provider):
    """A flash attention that hands out what it computed once, so that a run costs what a method adds to it.

    Its gradients are the caller's to add to, so they change from run to run: they are good for timing only.
    """

    name = "replayed"

    def __init__(self, attention: Provider, step: Step):
        query, key, value = step.layers[0]
        self._forward = tuple(attention.forward(query, key, value, step.call))
        self._gradients = attention.backward(step.grad_output, query, key, value, self._forward, step.call)

    def tensors(self) -> tuple[Tensor, ...]:
        return *self._forward, *self._gradients

    def check(self, query, key, value, call):
        pass

    def forward(self, query, key, value, call):
        return tuple(tensor.detach() for tensor in self._forward)

    def backward(self, grad_output, query, key, value, forward, call, grad_lse=None):
        return tuple(tensor.detach() for tensor in self._gradients)


@dataclass(frozen=True)
class Forward:
    """What a forward returns: outputs and maps of the supervised layers, the loss, and what stays alive with it."""

    outputs: Sequence[Tensor]
    maps: Sequence[Tensor]
    loss: Tensor
    attentions: Sequence[Tensor] = ()


Layers = Sequence[tuple[Tensor, Tensor, Tensor]]
Done = Callable[[], None]  # called after each layer's forward
Method = Callable[[Step, Layers, Done], Forward]


def this_project(step: Step, layers: Layers, done: Done) -> Forward:
    outputs, maps = [], []
    for query, key, value in layers:
        output, layer_maps = flash_noun_attention(query, key, value, step.queries, provider=step.attention)
        outputs.append(output)
        maps.append(layer_maps)
        done()
    return Forward(outputs, maps, our_mask_loss(maps, step))


def gathered_rows(
    step: Step, layers: Layers, done: Done, *, softmax: str = "causal", numerics: str = "stable"
) -> Forward:
    outputs, maps = [], []
    for query, key, value in layers:
        outputs.append(_Attention.apply(query, key, value, step.attention, step.call))
        maps.append(_row_maps(query, key, step, softmax))
        done()
    return Forward(outputs, maps, plain_mask_loss(maps, step, numerics))


def _row_maps(query: Tensor, key: Tensor, step: Step, softmax: str) -> Tensor:
    """[R, N]: scores of the gathered rows in the inputs' precision, softmax and head mean in fp32."""
    queries = step.queries
    num_heads, num_key_heads = query.shape[1], key.shape[1]
    end = int(queries.key_end.max()) if softmax == "causal" else key.shape[2]
    rows = query[0, :, queries.position].unflatten(0, (num_key_heads, -1)).flatten(1, 2)  # [Hkv, g·R, D]
    scores = (rows @ key[0, :, :end].mT * step.call.scale).view(num_heads, -1, end)
    if softmax == "causal":
        scores = scores.masked_fill(torch.arange(end) >= queries.key_end[:, None], float("-inf"))
    p = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return p.mean(0)[:, queries.key_sets[0]]


def all_text_rows(step: Step, layers: Layers, done: Done) -> Forward:
    """The last of the layers are the supervised ones. All attentions are kept to the end, as a model's output."""
    text = slice(step.length - step.geometry.text, step.length)
    first_supervised = len(layers) - step.geometry.supervised
    outputs, attentions = [], []
    for number, (query, key, value) in enumerate(layers):
        if number >= first_supervised:
            outputs.append(_Attention.apply(query, key, value, step.attention, step.call))
        attentions.append(_text_attention(query[:, :, text], key, step.call.scale))
        done()
    nouns, video = step.queries.position - text.start, step.queries.key_sets[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    means = [attention.mean(1)[0, :, video].to(dtype) for attention in attentions[first_supervised:]]
    maps = [mean[nouns] for mean in means]
    return Forward(outputs, maps, plain_mask_loss(maps, step, "paper"), attentions)


def _text_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[1, Hq, text, L], not causal; softmax in fp32, then the inputs' precision, as transformers' eager attention."""
    batch, num_key_heads, length, head_dim = key.shape
    group = query.shape[1] // num_key_heads
    key = key[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, query.shape[1], length, head_dim)
    scores = query @ key.mT * scale
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)


def our_mask_loss(maps: Sequence[Tensor], step: Step) -> Tensor:
    return mask_alignment_loss(maps, step.targets)


def plain_mask_loss(maps: Sequence[Tensor], step: Step, numerics: str) -> Tensor:
    """In plain operations, pair by pair: product over layers, min-max, interpolation, cross-entropy, mean."""
    masks = [mask.to(maps[0].dtype) for mask in step.masks]
    if numerics == "paper":
        fused = math.prod(maps)
        fused = fused / (fused.sum(-1, keepdim=True) + 1e-6)
    else:
        fused = sum(layer.log() for layer in maps)
    losses = []
    for row, start, height, width, mask in zip(*(index.tolist() for index in step.indices()), strict=True):
        frame = fused[row, start : start + height * width].view(1, 1, height, width)
        if numerics == "paper":
            p = (frame - frame.min()) / (frame.max() - frame.min() + 1e-6)
        else:
            frame = (frame - frame.detach().max()).exp()
            p = 1e-6 + (1 - 2e-6) * (frame - frame.min()) / (frame.max() - frame.min())
        p = F.interpolate(p, size=masks[mask].shape, mode="bilinear", align_corners=False)
        losses.append(F.binary_cross_entropy(p[0, 0], masks[mask]))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class MethodCase:
    """A method as it is measured.

    Attributes:
        run: its forward.
        every_layer: whether it computes something at every layer, or at the supervised ones only.
        slow_from: from this number of rows on it is timed once.
    """

    run: Method
    every_layer: bool = False
    slow_from: int = 1000

    def rounds(self, num_rows: int) -> int:
        return 1 if num_rows >= self.slow_from else 3

    def num_layers(self, geometry: Geometry) -> int:
        return geometry.num_layers if self.every_layer else geometry.supervised


METHODS = {
    "this project": MethodCase(this_project),
    "gathered rows": MethodCase(gathered_rows, slow_from=64),
    "all text rows": MethodCase(all_text_rows, every_layer=True, slow_from=0),
}


def run_step(
    step: Step, method: Method, num_layers: int, *, done: Done = lambda: None, between: Done = lambda: None, keep=False
) -> tuple[Forward, list[tuple[Tensor, ...]]]:
    """Forward, `between`, backward. With `keep`, ∂query, ∂key and ∂value of the supervised layers, the last first;
    else they are dropped where they arrive, as by a model that goes on with its backward."""
    gradients: list[tuple[Tensor, ...]] = []
    receive = gradients.append if keep else lambda _: None
    anchor = torch.zeros((), requires_grad=True)
    layers = [_Projection.apply(anchor, receive, *layer) for layer in step.layers[len(step.layers) - num_layers :]]
    forward = method(step, layers, done)
    between()
    roots = [forward.loss, *forward.outputs]
    torch.autograd.backward(roots, [None, *[step.grad_output] * len(forward.outputs)])
    return forward, gradients


class _Projection(torch.autograd.Function):
    """Stands where a model computes query, key and value: hands out the given ones and receives their gradients."""

    @staticmethod
    def forward(ctx, anchor, receive, query, key, value):
        ctx.receive = receive
        return query.detach(), key.detach(), value.detach()

    @staticmethod
    def backward(ctx, *gradients):
        ctx.receive(gradients)
        return (None,) * 5


class _Attention(torch.autograd.Function):
    """The flash attention as a node of its own."""

    @staticmethod
    def forward(ctx, query, key, value, provider, call):
        output, *rest = provider.forward(query, key, value, call)
        ctx.provider, ctx.call = provider, call
        ctx.save_for_backward(query, key, value, output, *rest)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, *forward = ctx.saved_tensors
        gradients = ctx.provider.backward(grad_output, query, key, value, tuple(forward), ctx.call)
        return *gradients, None, None
