"""Methods that compute noun maps and a mask loss beside a flash attention.

swim_fast            `flash_noun_attention` at the supervised layers, a softmax over each patch; `mask_alignment_loss`:
                     mean over layers, the probability itself
swim_fast, causal    the same with the model's own softmax, product over layers and min-max
gathered rows        flash attention beside a plain softmax of the R gathered query rows, by autograd; a plain loss
recomputed q and k   as GUI-AIMA (arXiv 2511.00810) does it: at all layers query rows and keys made again from the
                     hidden states, key heads repeated, the rows' per-head probabilities kept; a plain loss
all text rows        as SWIM's released code does it: at all layers the softmax of every text query, with the key heads
                     repeated; the nouns picked out at the end; a plain loss with the released prediction

The second computes another loss than the first, the last one a third; the others compute that of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_loss.inputs import Geometry, Layers, Step, indices_of, project
from swim_fast.loss.mask_loss import mask_alignment_loss
from swim_kernels import NounQueries, flash_noun_attention


@dataclass(frozen=True)
class Forward:
    """Results of a forward: outputs and maps of the supervised layers, the loss, and what stays alive with it."""

    outputs: Sequence[Tensor]
    maps: Sequence[Tensor]
    loss: Tensor
    attentions: Sequence[Tensor] = ()


Done = Callable[[], None]  # called after each layer's forward


def forward_swim_fast(step: Step, layers: Layers, done: Done) -> Forward:
    outputs, maps = _flash_maps(step, layers, done, step.patch_queries)
    loss = mask_alignment_loss(maps, step.patch_targets)
    return Forward(outputs, [layer.view(len(step.queries), -1) for layer in maps], loss)


def forward_swim_fast_causal(step: Step, layers: Layers, done: Done) -> Forward:
    outputs, maps = _flash_maps(step, layers, done, step.queries)
    return Forward(outputs, maps, mask_alignment_loss(maps, step.targets, fusion="product", prediction="min_max"))


def _flash_maps(step: Step, layers: Layers, done: Done, queries: NounQueries) -> tuple[list[Tensor], list[Tensor]]:
    outputs, maps = [], []
    for query, key, value in layers:
        output, layer_maps = flash_noun_attention(query, key, value, queries, provider=step.attention)
        outputs.append(output)
        maps.append(layer_maps)
        done()
    return outputs, maps


def forward_gathered_rows(
    step: Step, layers: Layers, done: Done, *, softmax: str = "frame", prediction: str = "probability"
) -> Forward:
    outputs, maps = [], []
    for query, key, value in layers:
        outputs.append(_Attention.apply(query, key, value, step.attention, step.call))
        maps.append(_row_maps(query, key, step, softmax))
        done()
    return Forward(outputs, maps, plain_loss(maps, step, prediction))


def _row_maps(query: Tensor, key: Tensor, step: Step, softmax: str) -> Tensor:
    """Return maps [R, N]: scores of the gathered rows in the inputs' precision, softmax and head mean in fp32."""
    queries, video = step.queries, step.queries.key_sets[0]
    num_heads, num_key_heads = query.shape[1], key.shape[1]
    if softmax == "frame":
        key = key[0, :, video[0] : video[-1] + 1]
    else:
        key = key[0, :, : int(queries.key_end.max()) if softmax == "causal" else key.shape[2]]
    rows = query[0, :, queries.position].unflatten(0, (num_key_heads, -1)).flatten(1, 2)  # [Hkv, g·R, D]
    scores = (rows @ key.mT * step.call.scale).view(num_heads, -1, key.shape[1])
    if softmax == "frame":
        return _softmax_of_patches(scores, step).mean(0)
    if softmax == "causal":
        scores = scores.masked_fill(
            torch.arange(key.shape[1], device=key.device) >= queries.key_end[:, None], float("-inf")
        )
    p = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return p.mean(0)[:, video]


def _softmax_of_patches(scores: Tensor, step: Step) -> Tensor:
    """Return p [Hq, R, N] of scores on the video, each patch by itself, in fp32."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores.unflatten(-1, (step.geometry.patches, -1)), dim=-1, dtype=dtype).flatten(-2)


def forward_recomputed(step: Step, layers: Layers, done: Done, *, tie: bool = False) -> Forward:
    """The last of the layers are the supervised ones; per-head probabilities of all are kept to the end.

    tie: gradients of the recomputed query and key also reach the layers' own, for comparison.
    """
    first_supervised = len(layers) - step.geometry.supervised
    video, positions = step.queries.key_sets[0], step.queries.position
    head_dim, group = step.geometry.head_dim, step.geometry.num_heads // step.geometry.num_key_heads
    anchor = torch.zeros((), requires_grad=True)
    outputs, attentions = [], []
    for index, ((query, key, value), source) in enumerate(
        zip(layers, step.sources[len(step.sources) - len(layers) :], strict=True)
    ):
        if index >= first_supervised:
            outputs.append(_Attention.apply(query, key, value, step.attention, step.call))
        hidden, query_weight, key_weight = _Projection.apply(anchor, lambda _: None, *source)
        rotation_of_rows = tuple(part[positions] for part in step.rotation)
        rows = project(hidden[positions], query_weight, rotation_of_rows, head_dim)  # [Hq, R, D]
        keys = project(hidden, key_weight, step.rotation, head_dim)  # [Hkv, L, D]
        if tie:
            rows, keys = _Tie.apply(rows, query[0, :, positions]), _Tie.apply(keys, key[0])
        keys = keys[:, None].expand(-1, group, -1, -1).flatten(0, 1)  # repeated
        scores = rows @ keys[:, video[0] : video[-1] + 1].mT * step.call.scale
        attentions.append(_softmax_of_patches(scores, step))
        done()
    maps = [attention.mean(0) for attention in attentions[first_supervised:]]
    return Forward(outputs, maps, plain_loss(maps, step, "probability"), attentions)


def forward_all_text_rows(step: Step, layers: Layers, done: Done) -> Forward:
    """The last of the layers are the supervised ones. All attentions are kept to the end, as a model's output."""
    text = slice(step.length - step.geometry.text, step.length)
    first_supervised = len(layers) - step.geometry.supervised
    outputs, attentions = [], []
    for index, (query, key, value) in enumerate(layers):
        if index >= first_supervised:
            outputs.append(_Attention.apply(query, key, value, step.attention, step.call))
        attentions.append(_text_attention(query[:, :, text], key, step.call.scale))
        done()
    nouns, video = step.queries.position - text.start, step.queries.key_sets[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    means = [attention.mean(1)[0, :, video].to(dtype) for attention in attentions[first_supervised:]]
    maps = [mean[nouns] for mean in means]
    return Forward(outputs, maps, plain_loss(maps, step, "released"), attentions)


def _text_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[1, Hq, text, L], not causal; softmax in fp32, then the inputs' precision, as transformers' eager attention."""
    batch, num_key_heads, length, head_dim = key.shape
    group = query.shape[1] // num_key_heads
    key = key[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, query.shape[1], length, head_dim)
    scores = query @ key.mT * scale
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)


def swim_fast_loss(maps: Sequence[Tensor], step: Step) -> Tensor:
    return mask_alignment_loss(maps, step.targets)


def plain_loss(maps: Sequence[Tensor], step: Step, prediction: str = "probability") -> Tensor:
    """The mask loss in plain operations, pair by pair: fusion of layers, prediction, interpolation, cross-entropy."""
    masks = [mask.to(maps[0].dtype) for mask in step.masks]
    if prediction == "probability":
        fused = sum(maps) / len(maps)
    elif prediction == "released":
        fused = math.prod(maps)
        fused = fused / (fused.sum(-1, keepdim=True) + 1e-6)
    else:
        fused = sum(layer.log() for layer in maps)
    losses = []
    for row, start, height, width, mask in zip(*(index.tolist() for index in indices_of(step.targets)), strict=True):
        patch = fused[row, start : start + height * width].view(1, 1, height, width)
        if prediction == "released":
            p = (patch - patch.min()) / (patch.max() - patch.min() + 1e-6)
        else:
            if prediction == "min_max":
                patch = (patch - patch.detach().max()).exp()
                patch = (patch - patch.min()) / (patch.max() - patch.min())
            p = 1e-6 + (1 - 2e-6) * patch
        p = F.interpolate(p, size=masks[mask].shape, mode="bilinear", align_corners=False)
        losses.append(F.binary_cross_entropy(p[0, 0], masks[mask]))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Method:
    """A method as it is measured.

    Attributes:
        forward: called with a step, the layers' (query, key, value), and a function to call after each layer.
        every_layer: it computes something at every layer, not at the supervised ones only.
        text_rows: it does so for every text token, not for the nouns only.
        slow_from: number of rows from which it is timed once.
    """

    forward: Callable[[Step, Layers, Done], Forward]
    every_layer: bool = False
    text_rows: bool = False
    slow_from: int = 1000

    def rounds(self, num_rows: int) -> int:
        return 1 if num_rows >= self.slow_from else 3

    def num_layers(self, geometry: Geometry) -> int:
        return geometry.num_layers if self.every_layer else geometry.supervised


OURS, CAUSAL, GATHERED, RECOMPUTED = "swim_fast", "swim_fast, causal", "gathered rows", "recomputed q and k"
PUBLISHED = "all text rows"
METHODS = {
    OURS: Method(forward_swim_fast),
    CAUSAL: Method(forward_swim_fast_causal),
    GATHERED: Method(forward_gathered_rows, slow_from=64),
    RECOMPUTED: Method(forward_recomputed, every_layer=True, slow_from=0),
    PUBLISHED: Method(forward_all_text_rows, every_layer=True, text_rows=True, slow_from=0),
}
LOSS_OURS, LOSS_PLAIN = "mask loss, swim_fast", "mask loss, plain"
LOSSES = {LOSS_OURS: swim_fast_loss, LOSS_PLAIN: plain_loss}


def run_step(
    step: Step,
    forward: Callable[[Step, Layers, Done], Forward],
    num_layers: int,
    *,
    done: Done = lambda: None,
    between: Done = lambda: None,
    keep: bool = False,
) -> tuple[Forward, list[tuple[Tensor, ...]]]:
    """Run forward, `between`, and backward from the loss and the attention outputs.

    Returns the forward's results and, with `keep`, ∂query, ∂key and ∂value of the supervised layers, the last layer
    first. Without `keep` gradients are dropped where they arrive, as by a model that goes on with its backward.
    """
    gradients: list[tuple[Tensor, ...]] = []
    receive = gradients.append if keep else lambda _: None
    anchor = torch.zeros((), requires_grad=True)
    layers = [_Projection.apply(anchor, receive, *layer) for layer in step.layers[len(step.layers) - num_layers :]]
    result = forward(step, layers, done)
    between()
    roots = [result.loss, *result.outputs]
    torch.autograd.backward(roots, [None, *[step.grad_output] * len(result.outputs)])
    return result, gradients


class _Projection(torch.autograd.Function):
    """Stands where a model projects query, key and value: hands out given ones and receives their gradients."""

    @staticmethod
    def forward(ctx, anchor, receive, query, key, value):
        ctx.receive = receive
        return query.detach(), key.detach(), value.detach()

    @staticmethod
    def backward(ctx, *gradients):
        ctx.receive(gradients)
        return (None,) * 5


class _Tie(torch.autograd.Function):
    """Hands out the first of two equal tensors; both receive its gradient."""

    @staticmethod
    def forward(ctx, made, given):
        return made.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


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
