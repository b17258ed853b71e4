"""One YAML file describes a run; every key is typed, checked, and refused if nothing reads it.

Sections: `model`, `data`, `attention_loss`, `optimization`, and `training`, which takes any field of transformers'
`TrainingArguments` by its own name. `key.sub=value` on the command line replaces single values.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from swim_fast.data.batch.dataset import SourceOptions
from swim_fast.data.sample.builder import SampleOptions
from swim_fast.recipes import find_recipe

Part = Literal["vision_tower", "merger", "language_model"]  # of a model


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


@dataclass
class LoraConfig:
    """Low-rank adapters through peft (LoRA, arXiv 2106.09685; quantised, QLoRA, arXiv 2305.14314)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | None = None  # names of linear layers; None: all of the language model, its head not
    quantize: Literal["nf4", "int8"] | None = None  # the frozen weights, by bitsandbytes

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"model.lora.rank is {self.rank} and alpha {self.alpha:g}; both must be positive")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout is {self.dropout:g}; it must be at least 0 and below 1")
        if self.targets == []:
            raise ConfigError("model.lora.targets is empty: name linear layers, or leave it out for all of the decoder")


@dataclass
class ModelConfig:
    path: str  # folder or hub name of a Hugging Face checkpoint
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str | None = None  # sdpa, eager, flash_attention_2, …; None: transformers' choice
    freeze: list[Part] = field(default_factory=lambda: ["vision_tower"])
    liger: bool = True  # Liger's RMSNorm, SwiGLU, rotary embedding and fused cross-entropy, where they can run (CUDA)
    activation_offload: bool = False  # what backward needs of the decoder layers waits in the host's memory
    lora: LoraConfig | None = None  # train adapters instead of the weights


@dataclass
class DataConfig:
    train: list[SourceOptions] = field(default_factory=list)
    eval: dict[str, SourceOptions] = field(default_factory=dict)  # name -> file; each is scored under its name
    reader: Literal["decord", "torchcodec", "pyav"] = "decord"
    decode_timeout: float = 60.0  # seconds for one clip
    fps: float | None = None  # frames per second of the clip, up to max_frames; None: max_frames, whatever its length
    max_frames: int = 32
    min_pixels: int | None = None  # per frame; None: the processor's own
    max_pixels: int | None = None
    total_pixels: int | None = None  # of all frames of a clip together
    max_tokens: int | None = None  # longest sample; a longer one gets fewer frames; None: max_tokens_per_batch
    max_tokens_per_batch: int | None = None  # pack samples up to so many tokens into a batch without padding
    pack_look_ahead: int = 1024  # samples that are packed together

    def __post_init__(self):
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ConfigError(f"data.max_tokens_per_batch is {self.max_tokens_per_batch}; it must be positive")
        if self.pack_look_ahead < 1:
            raise ConfigError(f"data.pack_look_ahead is {self.pack_look_ahead}; it must be positive")
        if self.max_tokens_per_batch is not None and (self.max_tokens or 0) > self.max_tokens_per_batch:
            raise ConfigError(
                f"data.max_tokens {self.max_tokens} is above data.max_tokens_per_batch {self.max_tokens_per_batch}: "
                "a sample must fit into a batch; lower the first or raise the second"
            )


@dataclass
class AttentionLossConfig:
    """Choices of SWIM's mask loss (arXiv 2605.18018); see `swim_fast.loss.mask_loss.mask_alignment_loss`."""

    layers: list[int] | None = None  # None: every fifth counted back from the last; []: no maps at all
    text_weight: float = 0.05
    mask_weight: float = 1.0  # 0: maps are measured but not trained
    fusion: Literal["product", "mean", "none"] = "product"
    criterion: Literal["bce", "iou", "dice", "kl"] = "bce"
    numerics: Literal["stable", "paper"] = "stable"
    resolution: Literal["mask", "grid"] = "mask"
    query_position: Literal["noun", "predictor"] = "noun"
    softmax: Literal["causal", "full"] = "causal"
    backend: Literal["auto", "eager", "torch", "triton"] = "auto"
    fused: bool = True  # attention output and map of a layer from one autograd node, where its attention allows it

    def __post_init__(self):
        if self.text_weight < 0 or self.mask_weight < 0 or self.text_weight + self.mask_weight == 0:
            raise ConfigError("attention_loss.text_weight and mask_weight must be ≥ 0 and not both 0")
        if self.mask_weight > 0 and self.layers == []:
            raise ConfigError("attention_loss.layers is empty: name layers, or set attention_loss.mask_weight to 0")


@dataclass
class OptimizationConfig:
    """What `TrainingArguments` has no field for."""

    # of parts: vision_tower, merger, language_model; the others take training.learning_rate
    learning_rates: dict[str, float] = field(default_factory=dict)
    early_stopping_patience: int | None = None  # evaluations without a better training.metric_for_best_model
    on_nan: Literal["stop", "skip"] = "stop"  # at a loss that is NaN or infinite

    def __post_init__(self):
        for part, rate in self.learning_rates.items():
            where = f"optimization.learning_rates.{part}"
            if part not in get_args(Part):
                raise _unknown(where, part, get_args(Part))
            if not 0 <= rate < float("inf"):
                raise ConfigError(f"{where} is {rate}; it must be a number of at least 0")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ConfigError(
                f"optimization.early_stopping_patience is {self.early_stopping_patience}; it must be at least 1"
            )


@dataclass
class RunConfig:
    model: ModelConfig
    data: DataConfig
    attention_loss: AttentionLossConfig = field(default_factory=AttentionLossConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    training: dict[str, Any] = field(default_factory=dict)  # TrainingArguments by their own names

    def __post_init__(self):
        self.sample_options()  # refuses values out of range now, not when the first clip is read
        for part in self.optimization.learning_rates:
            if part in self.model.freeze:
                raise ConfigError(
                    f"optimization.learning_rates names {part}, which model.freeze keeps from training: remove it from "
                    "one of the two"
                )

    def sample_options(self) -> SampleOptions:
        """What the data layer needs to know."""
        data, loss = self.data, self.attention_loss
        return SampleOptions(
            max_frames=data.max_frames,
            fps=data.fps,
            min_pixels=data.min_pixels,
            max_pixels=data.max_pixels,
            total_pixels=data.total_pixels,
            max_tokens=data.max_tokens_per_batch if data.max_tokens is None else data.max_tokens,
            query_position=loss.query_position,
            softmax=loss.softmax,
            read_out="all" if loss.numerics == "paper" else "supervised",
            reader=data.reader,
            decode_timeout=data.decode_timeout,
        )

    def as_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    def training_arguments(self):
        """`transformers.TrainingArguments` of the `training` section.

        Raises:
            ConfigError: an unknown field (with the nearest known one), or a value that transformers refuses.
        """
        from transformers import TrainingArguments

        hints = typing.get_type_hints(TrainingArguments)
        known = {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}
        values = {}
        for key, value in self.training.items():
            if key not in known:
                raise _unknown(f"training.{key}", key, known)
            values[key] = _meant(value, known[key])
        for key, needed in _FIXED.items():
            if values.setdefault(key, needed) != needed:
                raise ConfigError(f"training.{key} must be {needed}: batches are dictionaries of this project's own")
        if self.data.max_tokens_per_batch is not None:
            if values.setdefault("per_device_train_batch_size", 1) != 1:
                raise ConfigError(
                    "training.per_device_train_batch_size counts samples, but data.max_tokens_per_batch packs as many "
                    "as fit: remove it"
                )
        if values.get("gradient_checkpointing"):  # the reentrant kind drops the gradient of the noun maps
            given = values.get("gradient_checkpointing_kwargs") or {}
            values["gradient_checkpointing_kwargs"] = {"use_reentrant": False} | given
        if self.optimization.early_stopping_patience is not None:  # a resumed run counts on where it was
            values.setdefault("restore_callback_states_from_checkpoint", True)
        values.setdefault("output_dir", "runs/swim")
        if self.deepspeed() and not isinstance(values["deepspeed"], dict):
            values["deepspeed"] = str(find_recipe(values["deepspeed"]))
        try:
            arguments = TrainingArguments(**values)
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(f"training: {error}") from error
        self._check_best_model(arguments)
        return arguments

    def _check_best_model(self, arguments) -> None:
        """Early stopping and the choice of the best checkpoint need evaluations that give the metric they go by."""
        patience, metric = self.optimization.early_stopping_patience, self.training.get("metric_for_best_model")
        if patience is not None:
            missing = [key for key in ("load_best_model_at_end", "metric_for_best_model") if not self.training.get(key)]
            if arguments.eval_strategy == "no":
                missing.append("eval_strategy (and save_strategy): steps or epoch")
            if missing:
                needed = ", ".join(f"training.{key}" for key in missing)
                raise ConfigError(f"optimization.early_stopping_patience needs {needed}")
        if patience is None and not arguments.load_best_model_at_end and arguments.save_strategy != "best":
            return
        from swim_fast.loss.metrics import METRICS

        keys = ("loss", "text_loss", "mask_loss", *METRICS)
        known = [f"eval_{name}_{key}" for name in self.data.eval for key in keys]
        if not known:
            raise ConfigError("the best checkpoint is chosen by an evaluation, but data.eval names no file")
        if metric is None or f"eval_{str(metric).removeprefix('eval_')}" not in known:
            near = difflib.get_close_matches(str(metric), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"
            raise ConfigError(f"training.metric_for_best_model is {metric!r}, which no evaluation gives; {hint}")

    def deepspeed(self) -> dict[str, Any] | None:
        """What `training.deepspeed` holds, or the file that it names; None without.

        Raises:
            ConfigError: the file cannot be read, or the run needs what DeepSpeed, told so, cannot do.
        """
        options = self.training.get("deepspeed")
        if not options:
            return None
        if not isinstance(options, dict):
            try:
                options = json.loads(find_recipe(options).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"training.deepspeed: cannot read {options}: {error}") from error
        if self.optimization.learning_rates and "optimizer" in options:  # which knows of one rate only
            raise ConfigError(
                "optimization.learning_rates needs the optimizer of training.optim, but training.deepspeed names one "
                "of its own: remove its section 'optimizer'"
            )
        lora = self.model.lora
        if lora and lora.quantize and options.get("zero_optimization", {}).get("stage") == 3:
            raise ConfigError(
                f"model.lora.quantize {lora.quantize} keeps the weights whole on every GPU, which ZeRO-3 divides: take "
                "ZeRO-2 (configs/deepspeed/zero2.json) or leave model.lora.quantize out"
            )
        return options


_FIXED = {"remove_unused_columns": False, "label_names": ["labels"]}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file or packaged recipe, apply `key.sub=value` overrides (values are YAML too) and check every key.

    Raises:
        ConfigError: naming file, key, and the nearest known key or the expected type.
    """
    path = find_recipe(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not of the form key.sub=value")
        _set(tree, key.strip().split("."), yaml.safe_load(text), override)
    try:
        return _build(RunConfig, tree, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _set(tree: dict, keys: list[str], value: Any, override: str) -> None:
    *parents, last = keys
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {key} is a single value and has no keys below it")
    tree[last] = value


def _unknown(where: str, key: str, known) -> ConfigError:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return ConfigError(f"unknown key {where!r}; {hint}")


def _build(cls: type, tree: Any, where: str):
    """An instance of dataclass `cls` from a mapping, refusing unknown, missing and mistyped keys."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'the file'} must be a mapping of keys, not {type(tree).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in tree:
        if key not in fields:
            raise _unknown(f"{prefix}{key}", str(key), fields)
    missing = [
        name
        for name, f in fields.items()
        if name not in tree and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key {prefix + missing[0]!r}")
    values = {key: _convert(value, hints[key], prefix + key) for key, value in tree.items()}
    try:
        return cls(**values)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} is {value!r}; choose one of: {', '.join(map(str, args))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is list and isinstance(value, list):
        return [_convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if hint is float and not isinstance(value, bool):
        number = _number(value)
        if isinstance(number, (int, float)):
            return float(number)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-5 (no dot) as text: give the number that was meant, else the value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _meant(value: Any, hint: Any) -> Any:
    """Undo what YAML 1.1 does to the values of TrainingArguments: 2e-5 comes as text, no as False."""
    accepted = (hint, *get_args(hint))
    if isinstance(value, str) and float in accepted:
        return _number(value)
    return "no" if value is False and bool not in accepted else value
