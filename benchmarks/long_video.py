"""Simulation of steps on long videos that ranks share, past what this machine can run.

    python -m benchmarks.long_video      # seconds, no GPU; writes benchmarks/long_video.md

Counted are operations (`swim_fast.training.flops`), memory (the dry run's), bytes of the exchanges
(`count_exchanges`, which a test holds to a run of two ranks) and of the noun-attention kernels (in Triton's
interpreter). Everything else is an assumption, in `Machine`. No GPU has confirmed any of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.core import markdown_table
from benchmarks.geometries import PUBLISHED, build_published_config
from benchmarks.kernels import noun_attention_bytes
from benchmarks.kernels.records import open_traffic
from swim_fast.data.batch.counts import BatchCounts
from swim_fast.training.dry_run.memory import GIB, Batch, Geometry, Part, Settings, count_saved_bytes, estimate

HERE = Path(__file__).parent
LENGTHS = {"16 k": 2**14, "64 k": 2**16, "128 k": 2**17, "256 k": 2**18, "1 M": 2**20}
RANKS = (1, 2, 4, 8, 16)
GPUS, MEMORY = 16, 80  # two nodes of eight
PATCH = (16, 32)  # tokens of a temporal patch, two frames of 448 × 896
TEXT, LABELS, NOUN_TOKENS, SUPERVISED_LAYERS = 512, 256, 4, 6
MASK_PIXELS = 720 * 1280


@dataclass(frozen=True)
class Machine:
    """An H100 SXM in a node of eight, and what is assumed to be achieved of its data sheet."""

    peak: float = 989.4e12  # FLOP/s, dense bf16
    products: float = 0.55  # share of the peak: matrix products with weights
    attention: float = 0.38  # flash-attention 2, forward
    attention_backward: float = 0.33
    vision: float = 0.35  # the tower's products
    vision_attention: float = 0.2  # many short sequences
    noun_products: float = 0.05  # tiles that are mostly padding
    vector: float = 0.3 * 66.9e12  # FLOP/s, fp32 without tensor cores
    memory: float = 0.8 * 3.35e12  # bytes/s
    nvlink: float = 0.75 * 450e9  # bytes/s each way and GPU
    infiniband: float = 0.8 * 50e9
    node: int = 8
    collective: float = 30e-6  # seconds before the first byte
    launch: float = 5e-6


H100 = Machine()


@dataclass(frozen=True)
class Step:
    """Seconds of one sample's step on each rank that shares it, by part, and GiB of a GPU."""

    products: float
    attention: float
    elementwise: float
    vision: float
    attention_loss: float
    exchanges: float
    weights: float  # gathering them, as far as computing does not hide it
    memory: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self)) - self.memory


def count_exchanges(
    geometry: Geometry,
    ranks: int,
    *,
    tokens: int,
    encoded: int,
    held: int,
    map_values: int = 0,
    checkpointing: bool = True,
    merger_trained: bool = True,
    size: int = 2,
) -> dict[str, int]:
    """Return the bytes that a rank hands to each kind of collective in forward and backward of one sequence.

    Args:
        tokens: of the whole sequence.
        encoded: visual tokens whose features the rank encodes.
        held: visual tokens of the rank's part.
        map_values: of all noun maps, layers × rows × columns.
        size: bytes of an activation.
    """
    own = -(-tokens // ranks)
    per_token = 2 * geometry.heads + 2 * max(geometry.key_heads, ranks)  # query, key, value there, the output back
    passes = 3 if checkpointing else 2  # forward, again in backward, and its gradient
    features = (encoded + held * merger_trained) * geometry.hidden * size  # there, and their gradients back
    return {
        "all_to_all": passes * geometry.layers * own * per_token * geometry.head_dim * size + features,
        "all_reduce": 4 * map_values,
    }


def transfer_seconds(machine: Machine, sent: float, ranks: int) -> float:
    """Return the time in which every rank sends each other one a P-th of `sent` bytes."""
    inside = min(ranks, machine.node)
    near, far = sent * (inside - 1) / ranks, sent * (ranks - inside) / ranks
    return max(near / machine.nvlink, far / machine.infiniband)


@dataclass(frozen=True)
class Model:
    """A published model without weights, as the default configuration trains it: all but the vision tower."""

    geometry: Geometry
    parts: tuple[Part, ...]
    flops: Any

    @classmethod
    @functools.cache
    def build(cls, name: str) -> Model:
        import torch
        from transformers import AutoModelForImageTextToText

        from swim_fast.demo.tiny_model import train_tokenizer
        from swim_fast.modeling.prepare import prepare_model
        from swim_fast.training.flops import StepFlops

        config = build_published_config(train_tokenizer(["a clip"], 256), PUBLISHED[name])
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        prepare_model(model, frozen=["vision_tower"])
        trained, frozen = (
            sum(p.numel() for p in model.parameters() if p.requires_grad is kind) for kind in (True, False)
        )
        largest = max(p.numel() for p in model.parameters())
        geometry = Geometry.from_config(config, largest_module=largest)
        return cls(geometry, (Part("all", trained, frozen, 2 * trained, 2 * frozen),), StepFlops(model))


def simulate(model: Model, tokens: int, ranks: int, machine: Machine = H100, gpus: int = GPUS) -> Step:
    """Return the step of a sample of `tokens` tokens that `ranks` GPUs share."""
    geometry, cells = model.geometry, PATCH[0] * PATCH[1]
    patches = (tokens - TEXT) // cells
    visual = patches * cells
    run = Settings(
        gpus=gpus, stage=3, checkpointing=True, liger=True, frames_apart=True, merger_trained=True,
        supervised_layers=SUPERVISED_LAYERS, sequence_parallel=ranks, embeds_part=True,
    )  # fmt: skip
    batch = Batch(tokens, tokens, NOUN_TOKENS, visual, NOUN_TOKENS * patches * MASK_PIXELS)
    memory = estimate(list(model.parts), geometry, run, batch).total / GIB

    text = model.flops(BatchCounts(LABELS, (tokens,), tokens, ()))
    vision = model.flops(BatchCounts(0, (), 0, ((patches, *PATCH),)))
    peak = ranks * machine.peak
    products = text.weights * 4 / 3 / (peak * machine.products)  # with the layers' forward once more
    once = text.text_attention / 3
    # forward twice; flash attention's backward makes the scores again, five products for the forward's two
    attention = once / peak * (2 / machine.attention + 2.5 / machine.attention_backward)
    tower = (vision.weights / machine.vision + vision.vision_attention / machine.vision_attention) / peak
    # written in both forwards, read in backward, and gradients of the same size
    elementwise = 4 * geometry.layers * tokens / ranks * count_saved_bytes(geometry, run) / machine.memory

    maps = SUPERVISED_LAYERS * NOUN_TOKENS * visual
    encoded, held = -(-patches // ranks) * cells, min(visual, -(-tokens // ranks))
    sent = count_exchanges(geometry, ranks, tokens=tokens, encoded=encoded, held=held, map_values=maps)
    exchanges = 0.0
    if ranks > 1:
        sent["all_reduce"] *= 2  # on the wire
        exchanges = sum(transfer_seconds(machine, size, ranks) for size in sent.values())
        exchanges += machine.collective * (3 * 2 * geometry.layers + 3)
    loss = _attention_loss_seconds(geometry, visual, patches, ranks, machine)
    # ZeRO-3: all weights to every GPU in forward and in backward, all gradients back; NVLink's share is the largest
    size = 2 * sum(part.trainable + part.frozen for part in model.parts)
    weights = max(0.0, 3 * size / machine.nvlink - products - attention - tower)
    return Step(products, attention, elementwise, tower, loss, exchanges, weights, memory)


@functools.cache
def _traffic_ratio(phase: str) -> float:
    """Return the bytes that noun attention's kernels asked for in the interpreter, for each byte of their floor."""
    rows = open_traffic(HERE / "kernels").records.values()
    counted = [row for row in rows if (row.softmax, row.phase) == ("patches", phase)]
    return sum(row.issued for row in counted) / counted[0].floor


def _attention_loss_seconds(geometry: Geometry, visual: int, patches: int, ranks: int, machine: Machine) -> float:
    """Return the time of maps and mask loss: softmax `frame`, masks of every patch. Its rows are not divided."""
    keys = noun_attention_bytes.key_bytes(visual, max(1, geometry.key_heads // ranks))
    floor = noun_attention_bytes.Floor(keys, keys, 4 * NOUN_TOKENS * visual, key=keys, added=keys)
    phases = ("forward, lse computed", "backward, added")
    moved = sum(floor.of(phase) * _traffic_ratio(phase) for phase in phases)
    operations = 5 * 2 * NOUN_TOKENS * visual * geometry.heads / ranks * geometry.head_dim
    layer = moved / machine.memory + operations / (machine.peak * machine.noun_products)
    # two layers add at most 60 launches (docs/gpu.md), each further one three and five
    launches = 60 + 8 * (SUPERVISED_LAYERS - 2)
    pixels = 60 * NOUN_TOKENS * patches * MASK_PIXELS / machine.vector  # operations a pixel, both ways
    return SUPERVISED_LAYERS * layer + pixels + launches * machine.launch


def list_ranks(name: str) -> list[int]:
    """Return the numbers of ranks of the table that can share the model's sequences."""
    from swim_fast.modeling.sequence_parallel import find_group_sizes

    size = PUBLISHED[name].size
    return [ranks for ranks in RANKS if ranks in (1, *find_group_sizes(size.num_heads, size.num_key_value_heads))]


def _format_seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def draw_model(name: str) -> list[str]:
    model = Model.build(name)
    header = ("tokens", "P", "GiB", "step", "products", "attention", "element-wise", "vision", "attention loss")
    header += ("exchanges", "weights", "efficiency", "tokens/s/GPU", "loss's share", "exchanges' share")
    rows = []
    for label, tokens in LENGTHS.items():
        alone = simulate(model, tokens, 1).seconds
        for ranks in list_ranks(name):
            step = simulate(model, tokens, ranks)
            size = f"{step.memory:.0f}" if step.memory <= MEMORY else f"**{step.memory:,.0f}**"
            parts = (step.products, step.attention, step.elementwise, step.vision, step.attention_loss)
            cells = [_format_seconds(part) for part in (step.seconds, *parts, step.exchanges, step.weights)]
            cells += [f"{alone / ranks / step.seconds:.0%}", f"{tokens / ranks / step.seconds:,.0f}"]
            shares = [f"{part / step.seconds:.1%}" for part in (step.attention_loss, step.exchanges)]
            rows.append((label, ranks, size, *cells, *shares))
    return [f"## {name}", "", *markdown_table(header, "r" * len(header), rows), ""]


# what is assumed otherwise, and by what the step of 128 k tokens among four (7B) and of 1 M among sixteen (3B) changes
VARIANTS = {
    "as assumed": {},
    "NVLink and InfiniBand at half of it": {"nvlink": Machine.nvlink / 2, "infiniband": Machine.infiniband / 2},
    "attention at twice the share (flash-attention 3)": {"attention": 0.76, "attention_backward": 0.66},
    "matrix products at 40 % of the peak": {"products": 0.4},
    "all within one NVLink domain": {"node": 72},
}


def draw_variants() -> list[str]:
    rows = []
    for label, changes in VARIANTS.items():
        machine, cells = dataclasses.replace(H100, **changes), []
        for name, tokens, ranks in (("Qwen2.5-VL-7B", 2**17, 4), ("Qwen2.5-VL-3B", 2**20, 16)):
            alone, step = (simulate(Model.build(name), tokens, count, machine) for count in (1, ranks))
            cells += [f"{_format_seconds(step.seconds)} s", f"{alone.seconds / ranks / step.seconds:.0%}"]
        rows.append((label, *cells))
    header = ("assumption", "7B, 128 k, P 4", "efficiency", "3B, 1 M, P 16", "efficiency")
    return markdown_table(header, "lrrrr", rows)


def draw_exchanges() -> list[str]:
    rows = []
    for name in PUBLISHED:
        geometry = Model.build(name).geometry
        for label in ("128 k", "1 M"):
            for ranks in list_ranks(name)[1:]:
                own = LENGTHS[label] // ranks
                sizes = [
                    own * heads * geometry.head_dim * 2 / 1e6
                    for heads in (geometry.heads, 2 * max(geometry.key_heads, ranks))
                ]
                sent = count_exchanges(geometry, ranks, tokens=LENGTHS[label], encoded=0, held=0)["all_to_all"]
                rows.append(
                    (name, label, ranks, *(f"{size:,.0f} MB" for size in (*sizes, sizes[0])), f"{sent / 1e9:,.1f} GB")
                )
    header = ("model", "tokens", "P", "query", "key, value", "output", "a step, all layers")
    return markdown_table(header, "lrrrrrr", rows)


_TEXT = """# Long videos among several GPUs: a simulation

Written by `python -m benchmarks.long_video`. **Nothing here was measured, and no GPU has confirmed it.** Operations,
bytes and memory are counted or computed; the speed at which they are done is assumed.

- **Counted**: matrix products and attention (`swim_fast.training.flops`), a layer's forward once more for activation
  checkpointing, flash attention's five products in backward; bytes of the exchanges, which a test holds to those of a
  run of two ranks on a CPU; bytes of the noun-attention kernels, counted in Triton's interpreter at 16,384 keys and
  scaled with the keys; memory by the dry run, ZeRO-3 over {gpus} GPUs.
- **Assumed**, of an H100 SXM's data sheet: {products:.0%} of {peak:.0f} TFLOP/s in matrix products, {attention:.0%} and
  {backward:.0%} in attention's forward and backward, {vision:.0%} in the vision tower; {memory:.2f} TB/s of memory;
  {nvlink:.0f} GB/s of NVLink each way and GPU, {infiniband:.0f} GB/s of InfiniBand, nodes of {node};
  {collective:.0f} µs before each collective's first byte. No exchange is hidden behind computing, as in the software.
  ZeRO-3's gathering of weights is hidden as far as there is something to compute.
- **Sample**: one clip, {cells} tokens a temporal patch, {nouns} noun tokens, {layers} supervised layers, a mask of
  1280 × 720 for every patch: more masks than data have. The vision tower is frozen.
- **Left out**: decoding, a P-th of the clip for each rank, which may well be the slowest part; the copy of the pixels
  to the GPU; the optimizer's step; waiting for the slowest rank.

Seconds. A step is one sample. Efficiency is the time of one GPU, if it had the memory, over P times that of P.
GiB in bold do not fit {size} GiB.
"""

_REFUTED = """## What would refute it

On eight H100s with `configs/long_video_sp4_8xh100.yaml`, 128 k tokens, after warming up:

- an all-to-all of {sent:.0f} MB among four ranks (nccl-tests, `alltoall_perf`) that takes more than {limit:.1f} ms:
  then NVLink gives less than is assumed;
- a step of P 4 that is not between {low:.1f} and {high:.1f} s (25 % either way of {step:.1f} s), decoding left out;
- a step of P 2 that is not {ratio:.2f} times that of P 4, within 10 %: what P divides, and what it does not, would be
  wrong;
- more than {share:.2%} of the step in the attention loss (with it less without it), twice what is predicted;
- a peak of memory 10 % above the dry run's {gib:.0f} GiB (`torch.cuda.max_memory_allocated`).
"""


def draw_text() -> str:
    machine = H100
    facts = {
        "gpus": GPUS, "size": MEMORY, "peak": machine.peak / 1e12, "products": machine.products,
        "attention": machine.attention, "backward": machine.attention_backward, "vision": machine.vision,
        "memory": machine.memory / 1e12, "nvlink": machine.nvlink / 1e9, "infiniband": machine.infiniband / 1e9,
        "node": machine.node, "collective": machine.collective * 1e6, "cells": PATCH[0] * PATCH[1],
        "nouns": NOUN_TOKENS, "layers": SUPERVISED_LAYERS,
    }  # fmt: skip
    model = Model.build("Qwen2.5-VL-7B")
    two, four = (simulate(model, 2**17, ranks, gpus=8) for ranks in (2, 4))
    geometry = model.geometry
    sent = 2**15 * (geometry.heads + 2 * geometry.key_heads) * geometry.head_dim * 2
    seconds = transfer_seconds(machine, sent, 4) + machine.collective
    refuted = _REFUTED.format(
        sent=sent / 1e6, limit=1e3 * seconds, low=0.75 * four.seconds, high=1.25 * four.seconds, step=four.seconds,
        ratio=two.seconds / four.seconds, share=2 * four.attention_loss / four.seconds, gib=four.memory,
    )  # fmt: skip
    models = [line for name in PUBLISHED for line in draw_model(name)]
    lines = [_TEXT.format(**facts), *models, "## If it is otherwise", "", *draw_variants(), ""]
    lines += ["## What is exchanged", "", "In one layer, of one rank, its own part included; bf16.", ""]
    return "\n".join([*lines, *draw_exchanges(), "", refuted])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_video", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder of long_video.md")
    args = parser.parse_args()
    text = draw_text()
    (args.output / "long_video.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
