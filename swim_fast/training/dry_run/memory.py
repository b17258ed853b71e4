"""Memory of a training step on one GPU, estimated from the model's geometry and the run's settings.

Assumptions, with Ψ trainable parameters and N GPUs:

- **DeepSpeed, bf16.** All weights are bf16 (2 bytes), gradients bf16 (2), and AdamW keeps an fp32 master copy and two
  fp32 moments (12): 16 Ψ, of which ZeRO-1 divides the 12 by N, ZeRO-2 the gradients too, ZeRO-3 the weights too,
  those of frozen parameters included (Rajbhandari et al., arXiv 1910.02054, figure 1). DeepSpeed 0.19 accumulates
  gradients in the weights' type. At the optimizer's step, when the activations are gone, it makes an fp32 copy of
  the gradients that the GPU owns (with ZeRO-3 of a sub-group of them). Buckets, as transformers sets "auto": hidden²
  elements, twice with overlap. ZeRO-3 keeps up to `stage3_max_live_parameters` gathered, and at least the largest
  module. Offloaded states take one bucket.
- **Neither DeepSpeed nor FSDP.** Gradients and moments have the weights' type: AdamW keeps no master copy. With several
  GPUs DDP has another copy of the gradients in its buckets.
- **FSDP2.** Everything is divided by N, frozen weights too. With `bf16` or `fp16` accelerate keeps what is trained in
  fp32, gradients and moments with it (16 Ψ); else all have the weights' type. Gathered are embeddings and head, which
  stay, and two layers with their gradients; everything with `reshard_after_forward: false`.
- **Quantised weights** (arXiv 2305.14314): nf4 with quantised scales takes 4.127 bits a weight, int8 one byte; the
  largest matrix of a layer is in 16 bits while it is used.
- **Activations.** Per token and decoder layer, autograd saves of stock transformers: of an RMSNorm its input in fp32,
  the normalised values and its output; rotated query, key, value and the attention's output; four tensors of the MLP's
  width. Liger's kernels save less: input and output of a norm, three of the MLP's tensors. With activation
  checkpointing a layer keeps its input alone, and one layer at a time has everything; with offload the layers' share is
  on the host, and up to two layers are in transit. In a layer's backward there are gradients of the MLP's tensors and
  of a few of the layer's width. (Korthikanti et al., arXiv 2205.05198, count the same way.) The vision tower runs
  first: trained, its blocks save likewise; frozen, one block's intermediates are freed before the decoder. A
  trained merger keeps its norm and its two layers' inputs. Adapters keep an fp32 copy of their layer's input, and the
  tensor they work on. Of an MLP in tiles, one tile at a time has its tensors, in its backward.
- **Sequence parallelism.** A rank keeps a P-th of the tokens, and of the temporal patches where the tower keeps those
  apart, but noun maps whole. Where positions do not come with the batch, it embeds the whole sequence for a moment. Key
  heads are repeated to P where there are fewer. An exchange has what is sent, what comes, and its order by heads.
- **Scatter of the features.** Before the decoder: embeddings, features twice, and the result; `masked_scatter` on CUDA
  makes a mask (1 byte) and its running count (8) for every value of the embeddings.
- **Text loss.** A block of logits in the weights' type, in fp32 and their softmax; backward needs as much again.
- **Attention loss.** For every supervised layer one fp32 map, rows × readout keys, its gradient, and the rows' query
  and lse; the prediction once more; the masks, a bit for each pixel. Without the fused node also a query-sized
  gradient.
- **Reserve.** CUDA context, cuBLAS and NCCL buffers (2 GiB), and a twentieth of all for the allocator's fragmentation.

A GPU's "80 GB" are GiB (an H100 reports 81,559 MiB), and so are all sizes here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from swim_fast.families import find_family, get_head_dim
from swim_fast.modeling.linear_cross_entropy import BLOCK_LOGITS

GIB = 2**30
CONTEXT, FRAGMENTATION = 2 * GIB, 1 / 20
NF4_BITS, INT8_BITS = 4.127, 8.0
MOMENTS = {"sgd": 0, "lion": 1}  # per parameter; others as AdamW


@dataclass(frozen=True)
class Part:
    """Parameters of a part of the model, and their bytes as loaded."""

    name: str
    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model that activations depend on."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    vision_hidden: int
    vision_depth: int
    vision_intermediate: int
    patch_values: int  # pixel values of a patch, from the processor
    patches_per_token: float
    largest_module: int  # parameters that are gathered together
    largest_matrix: int = 0  # among the quantised ones
    adapted_width: int = 0  # input features of a layer's linear modules with adapters, summed
    adapted_mlp_width: int = 0  # of them, those of the MLP
    group_sizes: tuple[int, ...] = ()  # numbers of ranks that can share a sequence

    @classmethod
    def from_config(cls, config, **more: Any) -> Geometry:
        """Return the geometry of a model's configuration; `more`: the fields that it lacks."""
        text, vision = config.get_text_config(), find_family(config).vision(config)
        return cls(
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_heads=text.num_key_value_heads,
            head_dim=get_head_dim(text),
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            vision_hidden=vision.hidden,
            vision_depth=vision.depth,
            vision_intermediate=vision.intermediate,
            patch_values=vision.patch_values,
            patches_per_token=vision.patches_per_token,
            **more,
        )


@dataclass(frozen=True)
class Settings:
    """Settings of a run that its memory depends on."""

    gpus: int = 1
    stage: int | None = None  # of ZeRO; None: no DeepSpeed
    fsdp: bool = False
    reshard: bool = True  # FSDP's: a layer's weights are given back after its forward
    masters: bool = False  # FSDP's fp32 weights of what is trained
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bf16: bool = True  # DeepSpeed's; else its weights are fp32
    size: int = 2  # bytes of an activation
    optim: str = "adamw_torch"
    checkpointing: bool = False
    mlp_tiles: int = 1
    activation_offload: bool = False
    liger: bool = False
    eager: bool = False  # attention probabilities are kept
    vision_trained: bool = False  # the tower's own blocks
    merger_trained: bool = False
    supervised_layers: int = 0
    fused: bool = True
    sequence_parallel: int = 1  # P, ranks that share a sample
    frames_apart: bool = False  # each of them has a P-th of the temporal patches
    embeds_part: bool = False  # and embeds its tokens alone
    max_live_parameters: int = 10**9
    sub_group: int = 10**9


@dataclass(frozen=True)
class Batch:
    """Padded or packed batch of one GPU."""

    tokens: int  # padding included; all are counted as visual, as nearly all are
    longest: int  # tokens of its longest sequence
    rows: int = 0
    keys: int = 0  # columns of a map
    mask_pixels: int = 0


@dataclass
class States:
    """Bytes of one part on one GPU."""

    weights: float
    gradients: float
    optimizer: float


@dataclass
class Estimate:
    """Bytes on one GPU: `items` at the peak of forward and backward, `step` at the optimizer's step."""

    items: dict[str, float]
    step: float
    states: dict[str, States] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return (1 + FRAGMENTATION) * max(sum(self.items.values()), self.step) + CONTEXT


def estimate_states(part: Part, run: Settings) -> States:
    """Return the bytes of weights, gradients and optimizer states of a part, per GPU."""
    n, psi, per_state = run.gpus, part.trainable, _bytes_per_state(run.optim)
    if run.fsdp:
        trained = 4 * psi if run.masters else part.trainable_bytes
        moments = _moments(run.optim) * min(per_state * psi, trained)
        return States((trained + part.frozen_bytes) / n, trained / n, moments / n)
    if run.stage is None:
        size = part.trainable_bytes / psi if psi else 0
        copies = 2 if n > 1 else 1
        moments = _moments(run.optim) * psi * min(per_state, size)
        return States(part.trainable_bytes + part.frozen_bytes, copies * part.trainable_bytes, moments)
    size = 2 if run.bf16 else 4
    frozen = min(part.frozen_bytes, size * part.frozen)  # quantised weights stay as they are
    weights, gradients = size * psi + frozen, size * psi
    optimizer = (4 + _moments(run.optim) * per_state) * psi
    if run.stage >= 1:
        optimizer /= n
    if run.stage >= 2:
        gradients /= n
    if run.stage >= 3:
        weights /= n
    if run.offload_optimizer:
        optimizer = 0
        gradients = 0 if run.stage >= 2 else gradients
    return States(0 if run.offload_parameters else weights, gradients, optimizer)


def _moments(optim: str) -> int:
    return next((count for name, count in MOMENTS.items() if name in optim), 2)


def _bytes_per_state(optim: str) -> float:
    return 1.03 if "8bit" in optim else 4  # blocks of 256 values share an fp32 scale, of either sign


def count_saved_bytes(geometry: Geometry, run: Settings) -> float:
    """Return the bytes that autograd saves per token and decoder layer without checkpointing."""
    g, size = geometry, run.size
    norm = 2 * size * g.hidden if run.liger else (4 + 2 * size) * g.hidden
    attention = size * g.head_dim * (2 * g.heads + 2 * _count_key_heads(g, run)) + 4 * g.heads
    mlp = _count_mlp_bytes(g, run) if run.mlp_tiles == 1 else 0
    return 2 * norm + attention + (4 + size) * (g.adapted_width - g.adapted_mlp_width) + mlp


def _count_mlp_bytes(geometry: Geometry, run: Settings) -> float:
    """Return the bytes that autograd saves per token of an MLP, or of one of its tiles."""
    return (3 if run.liger else 4) * run.size * geometry.intermediate + (4 + run.size) * geometry.adapted_mlp_width


def _count_key_heads(geometry: Geometry, run: Settings) -> int:
    """Return the key heads of all ranks that share a sequence: each has at least one."""
    return max(geometry.key_heads, run.sequence_parallel)


def _count_vision_bytes(geometry: Geometry, run: Settings) -> float:
    """Return the bytes that autograd saves per patch and block of the vision tower."""
    g, size = geometry, run.size
    norm = 2 * size * g.vision_hidden if run.liger else (4 + 2 * size) * g.vision_hidden
    return 2 * norm + 4 * size * g.vision_hidden + (3 if run.liger else 4) * size * g.vision_intermediate


def estimate_activations(geometry: Geometry, run: Settings, batch: Batch) -> dict[str, float]:
    """Return the bytes of activations kept between forward and backward, and of the largest temporary ones."""
    g, size, ranks = geometry, run.size, run.sequence_parallel
    own = -(-batch.tokens // ranks)  # tokens of this rank
    layer = own * count_saved_bytes(g, run)
    if run.eager:
        layer += batch.tokens * batch.longest * g.heads / ranks * (4 + 2 * size)
    ends = own * (4 + 4 * size) * g.hidden  # embeddings and the last norm
    inputs = g.layers * own * size * g.hidden
    kept = inputs if run.checkpointing else g.layers * layer
    if run.activation_offload:
        kept = 2 * kept / g.layers
    exchanged = (g.heads + 2 * _count_key_heads(g, run)) * g.head_dim if ranks > 1 else 0
    width = max(g.intermediate / run.mlp_tiles, exchanged)
    backward = own * size * (3 * width + 6 * g.hidden) + (layer if run.checkpointing else 0)
    if run.mlp_tiles > 1:
        backward += own / run.mlp_tiles * _count_mlp_bytes(g, run)
    scatter = (own if run.embeds_part else batch.tokens) * g.hidden * (4 * size + 9) - (ends + kept)

    patches = g.patches_per_token * batch.tokens / (ranks if run.frames_apart else 1)
    pixels = 4 * patches * g.patch_values
    narrowed = patches * g.patch_values * size if size < 4 else 0
    block = patches * _count_vision_bytes(g, run)
    passing = patches * max(30 * g.vision_hidden, size * (2 * g.vision_hidden + 4 * g.vision_intermediate))
    passing += narrowed
    if run.merger_trained:
        kept += patches * (4 + 4 * size) * g.vision_hidden
    if run.vision_trained:
        kept += narrowed
        kept += patches * size * g.vision_hidden * g.vision_depth if run.checkpointing else g.vision_depth * block
        passing += block if run.checkpointing else 0
    logits = min(BLOCK_LOGITS, own * g.vocabulary) * (2 * size + 12)
    # The tower is done before the decoder begins, and the loss before the decoder goes back.
    items = {
        "pixels": pixels,
        "activations kept for backward": ends + kept,
        "activations of the moment": max(
            backward, logits, scatter, passing - (0 if run.vision_trained else ends + kept)
        ),
    }
    if g.largest_matrix:
        items["a weight without quantisation"] = 2 * g.largest_matrix
    return items


def estimate_attention_loss(geometry: Geometry, run: Settings, batch: Batch) -> float:
    """Return the bytes of the noun maps and the mask loss."""
    ranks = run.sequence_parallel
    row = (run.size * geometry.heads * geometry.head_dim + 4 * geometry.heads) / ranks
    copies = 2 if ranks > 1 else 1  # stacked, to be added up
    maps = run.supervised_layers * batch.rows * (8 * copies * batch.keys + row)
    query = 0 if run.fused else batch.tokens * run.size * geometry.heads * geometry.head_dim / ranks
    return maps + 8 * batch.rows * batch.keys + batch.mask_pixels / 8 + (query if run.supervised_layers else 0)


def estimate(parts: list[Part], geometry: Geometry, run: Settings, batch: Batch) -> Estimate:
    """Return the memory of one GPU at the peak of a step."""
    by_part = {part.name: estimate_states(part, run) for part in parts}
    totals = {name: sum(getattr(s, name) for s in by_part.values()) for name in ("weights", "gradients", "optimizer")}
    items = {"weights": totals["weights"], "gradients": totals["gradients"], "optimizer states": totals["optimizer"]}
    trainable = sum(part.trainable for part in parts)
    step = sum(items.values())
    every = sum(part.trainable + part.frozen for part in parts)
    if run.fsdp:
        at_once = 2 * geometry.largest_module + 4 * every / geometry.layers
        items["gathered parameters"] = run.size * (min(every, at_once) if run.reshard else every)
    if run.stage is not None:
        size = 2 if run.bf16 else 4
        items["buckets"] = 2 * size * min(geometry.hidden**2, max(trainable, 1))
        own = trainable / run.gpus if run.stage else trainable
        step += 0 if run.offload_optimizer else 4 * (min(own, run.sub_group) if run.stage == 3 else own)
        if run.stage == 3:
            gathered = max(min(run.max_live_parameters, every), geometry.largest_module)
            items["gathered parameters"] = size * gathered * (run.gpus > 1 or run.offload_parameters)
    items |= estimate_activations(geometry, run, batch)
    items["attention loss"] = estimate_attention_loss(geometry, run, batch)
    return Estimate(items, step, by_part)


# Changes to a run, the cheapest first: they cost time, then accuracy.
REMEDIES = (
    ("training.gradient_checkpointing=true", {"checkpointing": True}),
    ("training.deepspeed=configs/deepspeed/zero2.json", {"stage": 2}),
    ("training.deepspeed=configs/deepspeed/zero3.json", {"stage": 3}),
    ("model.mlp_tiles=8", {"mlp_tiles": 8}),
    ("model.activation_offload=true", {"activation_offload": True}),
    ("training.deepspeed=configs/deepspeed/zero2_offload.json", {"stage": 2, "offload_optimizer": True}),
    (
        "training.deepspeed=configs/deepspeed/zero3_offload.json",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
)


# Changes of another kind, when these do not suffice.
OTHER_REMEDIES = (
    "fewer tokens in a batch (data.max_tokens, data.max_tokens_per_batch, data.max_frames, data.max_pixels)",
    "more GPUs, or adapters instead of the weights (model.lora={quantize: nf4})",
)


def suggest_changes(parts: list[Part], geometry: Geometry, run: Settings, batch: Batch, memory: float) -> list[str]:
    """Return the changes, in order, with which a step fits into `memory` bytes.

    Each is the first one that suffices by itself, else the one that saves most. Among them are `REMEDIES` and, last,
    the numbers of ranks that can share a sequence. If all do not suffice, `OTHER_REMEDIES` follow.
    """
    changes: list[str] = []
    sharing = [
        (f"training.sequence_parallel={ranks}", {"sequence_parallel": ranks})
        for ranks in geometry.group_sizes
        if run.gpus % ranks == 0
    ]
    remedies = (*REMEDIES, *sharing)
    while estimate(parts, geometry, run, batch).total > memory:
        choices = [(name, dataclasses.replace(run, **values)) for name, values in remedies if _adds(run, values)]
        sizes = [estimate(parts, geometry, choice, batch).total for _, choice in choices]
        enough = next((i for i, size in enumerate(sizes) if size <= memory), None)
        now = estimate(parts, geometry, run, batch).total
        if enough is None and (not sizes or min(sizes) >= 0.99 * now):
            return [*changes, *OTHER_REMEDIES]
        name, run = choices[sizes.index(min(sizes)) if enough is None else enough]
        changes = [change for change in changes if change.partition("=")[0] != name.partition("=")[0]] + [name]
    return changes


def _adds(run: Settings, values: dict[str, int | bool]) -> bool:
    """Return True for a change that the run does not have already."""
    if "stage" in values and (run.fsdp or values["stage"] < (run.stage or 0)):
        return False
    return any((getattr(run, key) or 0) < value for key, value in values.items())
