"""Dry run: the steps of a run and the memory they take, before weights are loaded or a GPU is used.

The model is built from its configuration on the meta device, so that `model.path` needs no weights. Lengths are those
of the real samples (`schedule.py`), memory is estimated from them and the model's geometry (`memory.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swim_fast.config import ConfigError, RunConfig
from swim_fast.training.arguments import build_arguments
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
    suggest_changes,
)
from swim_fast.training.dry_run.schedule import (
    Lengths,
    Supervision,
    measure_lengths,
    measure_supervision,
    plan_schedule,
)
from swim_fast.training.dry_run.text import format_lengths, format_memory, format_model, format_schedule, name_devices

TOKENS_PER_NOUN = 2  # as tokenizers split the names of things
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Report:
    """Estimates of a run; `str` is the text for people."""

    text: str
    estimates: dict[str, Estimate]  # of the "median" and the "longest" batch, and of one at the "limit" if there is one
    fits: bool  # of the longest batch
    changes: list[str]  # that make it fit

    def __str__(self) -> str:
        return self.text


def dry_run(config: RunConfig, gpus: int | None = None, gpu_memory: float = 80.0, limit: int = 2000) -> Report:
    """Report the steps of a run, and if they fit into the memory of its GPUs.

    Args:
        config: the run. Nothing is written but the lengths of samples, to the cache.
        gpus: number of GPUs; None: $WORLD_SIZE, or 1.
        gpu_memory: of each GPU, in GiB (an "80 GB" card has that many); a run with `use_cpu` has the host's instead.
        limit: number of records to measure, divided among the sources.

    Raises:
        ConfigError: an unusable configuration, a model folder without configuration, no usable record.
    """
    gpus = int(os.environ.get("WORLD_SIZE", "1")) if gpus is None else gpus
    if gpus < 1 or gpu_memory <= 0 or limit < 1:
        raise ConfigError(f"--gpus {gpus}, --gpu-memory {gpu_memory:g} and --limit {limit} must all be positive")
    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one file, e.g. data.train: [{path: train.jsonl}]")
    arguments = _build_arguments(config)
    model, processor = _build_meta_model(config)
    sharing = config.sequence_parallel
    _check_sharing(model, sharing, gpus)
    parts, geometry = _count_parts(model, config), _measure_geometry(model, config)
    settings = _collect_settings(config, arguments, model, gpus)
    memory = _measure_host_memory() if config.training.get("use_cpu") else gpu_memory

    dataset, lengths = measure_lengths(config, processor, limit)
    schedule = plan_schedule(config, arguments, dataset, lengths, gpus // sharing)
    tokens = {"median": int(np.median(schedule.batches)), "longest": int(schedule.batches.max())}
    sample_limit = config.sampling.max_tokens
    if config.data.max_tokens_per_batch is not None:
        tokens["limit"] = config.data.max_tokens_per_batch
    elif sample_limit is not None:
        tokens["limit"] = sample_limit * arguments.per_device_train_batch_size
    supervision = measure_supervision(dataset, config.data.max_frames)
    batches = {name: _build_batch(config, arguments, supervision, lengths, count) for name, count in tokens.items()}
    estimates = {name: estimate(parts, geometry, settings, batch) for name, batch in batches.items()}
    changes = suggest_changes(parts, geometry, settings, batches["longest"], memory * GIB)
    lines = [
        *format_model(config, parts, estimates["longest"], settings),
        *format_lengths(lengths),
        *format_schedule(config, arguments, schedule, lengths, gpus),
        *format_memory(batches, estimates, changes, memory, name_devices(config, gpus)),
    ]
    return Report("\n".join(lines), estimates, not changes, changes)


def _check_sharing(model, ranks: int, gpus: int) -> None:
    """Refuse ranks that cannot share a sample of this model, or that do not divide the GPUs."""
    if ranks == 1:
        return
    from swim_fast.modeling.sequence_parallel import check_group_size

    check_group_size(model.config, ranks)
    if gpus % ranks:
        raise ConfigError(
            f"training.sequence_parallel is {ranks}, and {gpus} GPU{'s' * (gpus > 1)} cannot be divided into groups of "
            f"{ranks}: dry-run with a multiple of {ranks} (--gpus {-(-gpus // ranks) * ranks}), or change it"
        )


def _build_arguments(config: RunConfig):
    """Return the run's `TrainingArguments` on a machine without its GPUs, its other ranks and DeepSpeed."""
    training = {key: value for key, value in config.training.items() if key != "deepspeed"}
    hidden = {name: os.environ.pop(name) for name in _RANK_VARIABLES if name in os.environ}  # it would wait for ranks
    try:
        return build_arguments(config.replace(training={**training, "use_cpu": True}))
    finally:
        os.environ.update(hidden)


def _measure_host_memory() -> float:
    """Return the memory of this machine in GiB, to one digit."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)


def _build_meta_model(config: RunConfig):
    """Return the prepared model without weights, and the processor."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from swim_fast.inference.loading import explain_failure, load_processor
    from swim_fast.modeling.prepare import prepare_model

    options, loss = config.model, config.attention_loss
    processor = load_processor(options.path)
    with explain_failure(options.path):
        described = AutoConfig.from_pretrained(options.path)
    saved = described.dtype or described.get_text_config().dtype or torch.float32
    dtype = saved if options.dtype == "auto" else getattr(torch, options.dtype)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(described, dtype=dtype)
    layers = loss.layers if loss else []
    prepare_model(model, lora=options.lora, frozen=options.freeze, layers=layers, mlp_tiles=options.mlp_tiles)
    return model, processor


def _get_quantized_bits(model, config: RunConfig) -> dict:
    """Return the bits of each weight that bitsandbytes quantises (linear layers of the decoder), by parameter."""
    from torch import nn

    from swim_fast.families import get_family

    quantize = config.model.lora.quantize if config.model.lora else None
    if quantize is None:
        return {}
    bits = NF4_BITS if quantize == "nf4" else INT8_BITS
    layers = model.get_submodule(get_family(model).language_model).layers
    linear = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    return {module.weight: bits for module in linear if not module.weight.requires_grad}  # adapters stay whole


def _count_parts(model, config: RunConfig) -> list[Part]:
    """Return the model's parts, each parameter in the first part that has it."""
    from swim_fast.families import get_family
    from swim_fast.modeling.freezing import get_part_parameters

    family, bits = get_family(model), _get_quantized_bits(model, config)
    adapters = {p for name, p in model.named_parameters() if "lora_" in name}
    by_part = {
        "merger": get_part_parameters(model)["merger"],
        "vision tower": model.get_submodule(family.visual).parameters(),
        "language model": model.get_submodule(family.language_model).parameters(),
        "head": model.get_submodule(family.head).parameters(),
    }
    by_part = {name: [p for p in parameters if p not in adapters] for name, parameters in by_part.items()}
    if adapters:
        by_part["adapters"] = list(adapters)
    seen, parts = set(), []
    for name, parameters in by_part.items():
        counts = dict.fromkeys(("trainable", "frozen", "trainable_bytes", "frozen_bytes"), 0)
        for p in parameters:
            if p not in seen:
                kind = "trainable" if p.requires_grad else "frozen"
                counts[kind] += p.numel()
                counts[f"{kind}_bytes"] += round(p.numel() * bits.get(p, 8 * p.element_size()) / 8)
        seen.update(parameters)
        parts.append(Part(name, **counts))
    return parts


def _measure_geometry(model, config: RunConfig) -> Geometry:
    from swim_fast.families import get_family
    from swim_fast.modeling.sequence_parallel import get_group_sizes

    layer = model.get_submodule(get_family(model).language_model).layers[0]
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    adapted = {name: module.in_features for name, module in layer.named_modules() if hasattr(module, "lora_A")}
    return Geometry.from_config(
        model.config,
        largest_module=max(own),
        largest_matrix=max((p.numel() for p in _get_quantized_bits(model, config)), default=0),
        adapted_width=sum(adapted.values()),
        adapted_mlp_width=sum(width for name, width in adapted.items() if name.startswith("mlp.")),
        group_sizes=tuple(get_group_sizes(model.config)),
    )


def _collect_settings(config: RunConfig, arguments, model, gpus: int) -> Settings:
    from swim_fast.families import get_family
    from swim_fast.modeling.freezing import get_part_parameters
    from swim_fast.modeling.noun_attention import get_attached_layers

    deepspeed = config.deepspeed()
    zero = (deepspeed or {}).get("zero_optimization", {})
    offloaded = {key: zero.get(f"offload_{key}", {}).get("device", "none") != "none" for key in ("optimizer", "param")}
    bf16 = (deepspeed or {}).get("bf16", {}).get("enabled", "auto")
    narrow = arguments.bf16 or arguments.fp16
    by_part = get_part_parameters(model)
    trained = {name: any(p.requires_grad for p in parameters) for name, parameters in by_part.items()}
    limits = {"max_live_parameters": "stage3_max_live_parameters", "sub_group": "sub_group_size"}
    return Settings(
        gpus=gpus,
        stage=int(zero.get("stage", 0)) if deepspeed is not None else None,
        fsdp=bool(arguments.fsdp),
        reshard=not arguments.fsdp or arguments.fsdp_plugin_args["reshard_after_forward"],
        masters=narrow,
        offload_optimizer=offloaded["optimizer"],
        offload_parameters=offloaded["param"],
        bf16=arguments.bf16 if bf16 == "auto" else bool(bf16),
        size=2 if narrow else min(4, max(p.element_size() for p in model.parameters() if p.is_floating_point())),
        optim=str(getattr(arguments.optim, "value", arguments.optim)),
        checkpointing=arguments.gradient_checkpointing,
        mlp_tiles=config.model.mlp_tiles,
        activation_offload=config.model.activation_offload,
        liger=config.model.liger,
        eager=config.model.attention == "eager",
        vision_trained=trained["vision_tower"],
        merger_trained=trained["merger"],
        supervised_layers=len(get_attached_layers(model)),
        fused=bool(config.attention_loss and config.attention_loss.fused),
        sequence_parallel=config.sequence_parallel,
        frames_apart=get_family(model).frames_apart,
        embeds_part=get_family(model).embeds_part,
        **{key: int(zero[name]) for key, name in limits.items() if isinstance(zero.get(name), (int, float))},
    )


def _build_batch(
    config: RunConfig, arguments, supervision: Supervision, lengths: Sequence[Lengths], tokens: int
) -> Batch:
    """Return a batch of `tokens` tokens in which every sample has the largest supervision of any record."""
    usable = np.concatenate([source.usable for source in lengths])
    packed = config.data.max_tokens_per_batch is not None
    samples = math.ceil(tokens / np.median(usable)) if packed else arguments.per_device_train_batch_size
    longest = int(min(usable.max(), tokens)) if packed else tokens // samples
    return Batch(
        tokens=tokens,
        longest=longest,
        rows=TOKENS_PER_NOUN * supervision.objects * samples,
        keys=longest,
        mask_pixels=supervision.mask_pixels * samples,
    )
