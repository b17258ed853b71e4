"""What a run will do and what its steps will hold, before weights are loaded or a GPU is taken.

The model is built from its configuration on the meta device, so that `model.path` needs no weights. Lengths are those
of the real samples, found without decoding their videos. What memory is estimated from is in `memory_estimate`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from swim_fast.config import ConfigError, RunConfig
from swim_fast.training.dry_run.memory import (
    GIB,
    INT8_BITS,
    NF4_BITS,
    Batch,
    Estimate,
    Geometry,
    Part,
    Settings,
    estimate,
    remedies,
)
from swim_fast.training.dry_run.text import length_lines, memory_lines, model_lines, schedule_lines

TOKENS_PER_NOUN = 2  # as tokenizers split the names of things
RECORDS_LOOKED_AT = 200  # of each source, for their masks
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Lengths:
    """Tokens of the samples of one source: int64, 0 for a record with a problem."""

    name: str
    measured: np.ndarray
    records: int
    weight: float

    @property
    def usable(self) -> np.ndarray:
        return self.measured[self.measured > 0]


@dataclass(frozen=True)
class Schedule:
    """Steps of a run. `batches`: tokens of batches, padding included, as one GPU gets them."""

    samples: int  # of an epoch
    steps_per_epoch: int
    steps: int
    samples_per_step: float
    batches: np.ndarray


@dataclass(frozen=True)
class Report:
    """All that is known; `str` is the text for people."""

    text: str
    estimates: dict[str, Estimate]  # of the "median" and the "longest" batch, and of one at the "limit" if there is one
    fits: bool  # the longest does
    changes: list[str]  # until it does

    def __str__(self) -> str:
        return self.text


def dry_run(config: RunConfig, gpus: int | None = None, gpu_memory: float = 80.0, limit: int = 2000) -> Report:
    """Say what a run will do, and whether its steps fit into the memory of its GPUs.

    Args:
        config: the run. Nothing of it is changed, nothing is written but the lengths of samples, to the cache.
        gpus: how many; None: $WORLD_SIZE, or 1.
        gpu_memory: of each GPU, in GiB (an "80 GB" card has that many).
        limit: records of which lengths are measured, shared out among the sources.

    Raises:
        ConfigError: an unusable configuration, a model folder without configuration, no usable record.
    """
    gpus = int(os.environ.get("WORLD_SIZE", "1")) if gpus is None else gpus
    if gpus < 1 or gpu_memory <= 0 or limit < 1:
        raise ConfigError(f"--gpus {gpus}, --gpu-memory {gpu_memory:g} and --limit {limit} must all be positive")
    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one file, e.g. data.train: [{path: train.jsonl}]")
    arguments = _arguments(config)
    model, processor = _meta_model(config)
    parts, geometry = _parts(model, config), _geometry(model, config)
    settings = _settings(config, arguments, model, gpus)

    dataset, lengths = _lengths(config, processor, limit)
    schedule = _schedule(config, arguments, dataset, lengths, gpus)
    tokens = {"median": int(np.median(schedule.batches)), "longest": int(schedule.batches.max())}
    limit_of_sample = config.sample_options().max_tokens
    if config.data.max_tokens_per_batch is not None:
        tokens["limit"] = config.data.max_tokens_per_batch
    elif limit_of_sample is not None:
        tokens["limit"] = limit_of_sample * arguments.per_device_train_batch_size
    supervision = _supervision(dataset, config.data.max_frames)
    batches = {name: _batch(config, arguments, supervision, lengths, count) for name, count in tokens.items()}
    estimates = {name: estimate(parts, geometry, settings, batch) for name, batch in batches.items()}
    changes = remedies(parts, geometry, settings, batches["longest"], gpu_memory * GIB)
    lines = [
        *model_lines(config, parts, estimates["longest"], settings),
        *length_lines(lengths),
        *schedule_lines(config, arguments, schedule, lengths, gpus),
        *memory_lines(batches, estimates, changes, gpu_memory, gpus),
    ]
    return Report("\n".join(lines), estimates, not changes, changes)


# the run


@contextmanager
def _one_process() -> Iterator[None]:
    """Without the variables of a launcher: TrainingArguments would wait for the other ranks to join."""
    kept = {name: os.environ.pop(name) for name in _RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _arguments(config: RunConfig):
    """The run's `TrainingArguments`, as checked on a machine without its GPUs and without DeepSpeed."""
    training = {key: value for key, value in config.training.items() if key != "deepspeed"}
    with _one_process():
        return dataclasses.replace(config, training={**training, "use_cpu": True}).training_arguments()


def _meta_model(config: RunConfig):
    """Model without weights, frozen and adapted as the run will have it, and processor."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from swim_fast.modeling.prepare import prepare_model

    options, loss = config.model, config.attention_loss
    try:
        described = AutoConfig.from_pretrained(options.path)
        processor = AutoProcessor.from_pretrained(options.path)
    except OSError as error:
        message = f"model.path {options.path!r} is neither a checkpoint folder nor to be had: {error}"
        raise ConfigError(message) from error
    saved = described.dtype or described.get_text_config().dtype or torch.float32
    dtype = saved if options.dtype == "auto" else getattr(torch, options.dtype)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(described, dtype=dtype)
    prepare_model(model, lora=options.lora, frozen=options.freeze, layers=loss.layers)
    return model, processor


def _quantized(model, config: RunConfig) -> dict[int, float]:
    """Bits of the weights in linear layers of the decoder, by the parameter's id, if bitsandbytes quantises them."""
    from torch import nn

    from swim_fast.modeling.families import get_family

    quantize = config.model.lora.quantize if config.model.lora else None
    if quantize is None:
        return {}
    bits = NF4_BITS if quantize == "nf4" else INT8_BITS
    layers = model.get_submodule(get_family(model).language_model).layers
    linear = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    return {id(module.weight): bits for module in linear if not module.weight.requires_grad}  # adapters stay whole


def _parts(model, config: RunConfig) -> list[Part]:
    """The model's parts: every parameter in the first of them that has it."""
    from swim_fast.modeling.families import get_family

    family, bits = get_family(model), _quantized(model, config)
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    adapters, seen, parts = {id(p) for p in trained}, set(), []
    of_part = {
        "merger": model.get_submodule(family.merger).parameters(),
        "vision tower": model.get_submodule(family.visual).parameters(),
        "language model": model.get_submodule(family.language_model).parameters(),
        "head": model.get_submodule(family.head).parameters(),
        "adapters": trained,
    }
    for name, parameters in of_part.items():
        counts = dict.fromkeys(("trainable", "frozen", "trainable_bytes", "frozen_bytes"), 0)
        for p in parameters:
            if id(p) in seen or (id(p) in adapters and name != "adapters"):
                continue
            seen.add(id(p))
            kind = "trainable" if p.requires_grad else "frozen"
            counts[kind] += p.numel()
            counts[f"{kind}_bytes"] += round(p.numel() * bits.get(id(p), 8 * p.element_size()) / 8)
        if name != "adapters" or trained:
            parts.append(Part(name, **counts))
    return parts


def _geometry(model, config: RunConfig) -> Geometry:
    from swim_fast.modeling.families import get_family

    layers = model.get_submodule(get_family(model).language_model).layers
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    quantized = _quantized(model, config)
    adapted = [module.in_features for module in layers[0].modules() if hasattr(module, "lora_A")]
    return Geometry.of(
        model.config,
        largest_module=max(own),
        largest_matrix=max(
            (p.numel() for p in layers.parameters() if id(p) in quantized and not p.requires_grad), default=0
        ),
        adapted_width=sum(adapted),
    )


def _settings(config: RunConfig, arguments, model, gpus: int) -> Settings:
    from swim_fast.modeling.families import get_family
    from swim_fast.modeling.noun_attention import get_attached_layers

    deepspeed = config.deepspeed()
    zero = (deepspeed or {}).get("zero_optimization", {})
    offloaded = {key: zero.get(f"offload_{key}", {}).get("device", "none") != "none" for key in ("optimizer", "param")}
    bf16 = (deepspeed or {}).get("bf16", {}).get("enabled", "auto")
    narrow = arguments.bf16 or arguments.fp16
    visual = model.get_submodule(get_family(model).visual)
    limits = {"max_live_parameters": "stage3_max_live_parameters", "sub_group": "sub_group_size"}
    return Settings(
        gpus=gpus,
        stage=int(zero.get("stage", 0)) if deepspeed is not None else None,
        offload_optimizer=offloaded["optimizer"],
        offload_parameters=offloaded["param"],
        bf16=arguments.bf16 if bf16 == "auto" else bool(bf16),
        size=2 if narrow else min(4, max(p.element_size() for p in model.parameters() if p.is_floating_point())),
        optim=str(getattr(arguments.optim, "value", arguments.optim)),
        checkpointing=arguments.gradient_checkpointing,
        activation_offload=config.model.activation_offload,
        liger=config.model.liger,
        eager=config.model.attention == "eager",
        vision_trained=any(p.requires_grad for p in visual.parameters()),
        supervised_layers=len(get_attached_layers(model)),
        fused=config.attention_loss.fused and config.attention_loss.softmax == "causal",
        **{key: int(zero[name]) for key, name in limits.items() if isinstance(zero.get(name), (int, float))},
    )


# the data


def _lengths(config: RunConfig, processor, limit: int):
    """The dataset, and of every source the lengths of its share of `limit` records."""
    from swim_fast.data.batch.dataset import SwimDataset
    from swim_fast.data.batch.lengths import sample_lengths
    from swim_fast.data.sample.builder import SampleBuilder

    builder = SampleBuilder(processor, config.sample_options())
    dataset = SwimDataset(config.data.train, builder)
    found = []
    for source, name, records in zip(config.data.train, dataset.names, dataset.lengths, strict=True):
        share = max(1, round(limit * records / max(len(dataset), 1)))
        measured = sample_lengths(SwimDataset([source], builder), limit=share)
        found.append(Lengths(name, measured, records, source.weight))
    if not any(len(source.usable) for source in found):
        raise ConfigError("no record of data.train can be used: `swim-fast data check` lists what is wrong with each")
    return dataset, found


def _schedule(config: RunConfig, arguments, dataset, lengths: Sequence[Lengths], gpus: int) -> Schedule:
    """Batches and steps. Of records that were not measured, lengths are drawn from those that were."""
    from swim_fast.data.batch.dataset import MixtureSampler

    random = np.random.default_rng(0)
    drawn = [
        source.measured if len(source.measured) == source.records else random.choice(source.measured, source.records)
        for source in lengths
    ]
    every = np.concatenate(drawn)
    order = MixtureSampler(dataset, arguments.seed if arguments.data_seed is None else arguments.data_seed)
    samples, size = len(order), arguments.per_device_train_batch_size
    accumulation = arguments.gradient_accumulation_steps
    if config.data.max_tokens_per_batch is not None:
        batches, per_rank = _packed(config, arguments, order, every, gpus)
        per_step = samples / per_rank * accumulation
    else:
        per_step = size * accumulation * gpus
        items = order.items(0).numpy()
        per_rank = math.ceil(math.ceil(samples / size) / gpus)
        groups = [every[items[start : start + size]] for start in range(0, len(items), size)]
        batches = np.array([(group > 0).sum() * group.max() for group in groups if group.max()])
    steps_per_epoch = max(1, math.ceil(per_rank / accumulation))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
    return Schedule(samples, steps_per_epoch, steps, per_step, batches)


def _packed(config: RunConfig, arguments, order, lengths: np.ndarray, gpus: int) -> tuple[np.ndarray, int]:
    """Tokens of the packed batches of an epoch, and how many batches a rank has of them."""
    from swim_fast.data.batch.packing import PackingSampler

    how = config.data.max_tokens_per_batch, config.data.pack_look_ahead
    sums = np.array([lengths[batch].sum() for batch in PackingSampler(order, lengths, *how)])
    epochs = 1 if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs)
    return sums[sums > 0], len(PackingSampler(order, lengths, *how, world_size=gpus, epochs=epochs))


def _batch(config: RunConfig, arguments, supervision: Supervision, lengths: Sequence[Lengths], tokens: int) -> Batch:
    """A batch of so many tokens, in which every sample has the most that any record has of supervision."""
    usable = np.concatenate([source.usable for source in lengths])
    packed = config.data.max_tokens_per_batch is not None
    samples = math.ceil(tokens / np.median(usable)) if packed else arguments.per_device_train_batch_size
    longest = int(min(usable.max(), tokens))
    return Batch(
        tokens=tokens,
        longest=longest,
        rows=TOKENS_PER_NOUN * supervision.objects * samples,
        keys=longest,
        mask_pixels=supervision.mask_pixels * samples,
    )


@dataclass(frozen=True)
class Supervision:
    """The most that any record looked at has: tagged nouns, and pixels of all its masks."""

    objects: int = 0
    mask_pixels: int = 0


def _supervision(dataset, max_frames: int) -> Supervision:
    """Looks at some records of every source, as they are in the file; broken ones are counted elsewhere."""
    from swim_fast.data.source.errors import DataError

    objects, pixels = 0, 0
    for file, records in zip(dataset.files, dataset.lengths, strict=True):
        for number in np.unique(np.linspace(0, records - 1, min(records, RECORDS_LOOKED_AT)).astype(int)).tolist():
            try:
                record = file[number]
            except DataError:
                continue
            objects = max(objects, len(record.objects))
            masks = sum(min(len(frames), max_frames) for frames in record.objects)
            pixels = max(pixels, masks * _mask_size(record))
    return Supervision(objects, pixels)


def _mask_size(record) -> int:
    """Pixels of a record's masks where the segmentations say their size, as RLE does; else those of 720p."""
    for segmentations in record.objects:
        for segmentation in segmentations.values():
            found = segmentation.get("segmentation", segmentation) if isinstance(segmentation, dict) else None
            size = found.get("size") if isinstance(found, dict) else None
            if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size):
                return size[0] * size[1]
    return 720 * 1280
