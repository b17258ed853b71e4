"""One YAML file describes a run; every key is typed, checked, and refused if nothing reads it.

Sections: `model`, `data`, `attention_loss`, `optimization`, and `training`, which takes any field of transformers'
`TrainingArguments` by its own name. `key.sub=value` on the command line replaces single values.

Nothing heavy is imported, so that a mistake is told at once: the names and types of `TrainingArguments` are read from
the source of the installed transformers.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from swim_fast.errors import OptionError, error_path, explain, named_paths, nearest
from swim_fast.options import (
    METRICS,
    AttentionLoss,
    Decoding,
    Labels,
    Lora,
    Options,
    Positive,
    Sampling,
    Source,
    Supervision,
    Weights,
    key_path,
    mistake,
)
from swim_fast.recipes import find_recipe
from swim_fast.training_fields import FIXED, NO_EFFECT, training_fields

Part = Literal["vision_tower", "merger", "language_model"]  # of a model


class ConfigError(OptionError):
    """A configuration that cannot be used; the message names the file, the keys and the remedy."""


class ModelConfig(Weights):
    """The checkpoint to start from, and what of it is trained."""

    path: str
    """Folder or hub name of a Hugging Face checkpoint."""
    freeze: list[Part] = ["vision_tower"]
    """Parts of the model that are not trained."""
    liger: bool = True
    """Liger's RMSNorm, SwiGLU, rotary embedding and fused cross-entropy, where they can run (CUDA)."""
    activation_offload: bool = False
    """Keep what backward needs of the decoder layers in the host's memory."""
    mlp_tiles: int = Field(1, gt=0)
    """Parts in which each decoder layer's MLP takes its tokens, for less memory; backward computes them again."""
    lora: Lora | None = None
    """Train adapters instead of the weights."""


class DataConfig(Sampling, Labels, Decoding):
    """The files, and how their records become batches."""

    train: list[Source] = []
    """Files to train on."""
    eval: dict[str, Source] = {}
    """Files to evaluate on, each under a name, by which it is scored."""
    live_maps: int = Field(4, ge=0)
    """Samples of these files whose maps are drawn at every evaluation, where training.report_to names tensorboard or
    wandb; each costs every rank its decoding and one forward."""
    max_tokens_per_batch: Annotated[int, Positive] | None = None
    """Pack samples up to so many tokens into a batch without padding; without max_tokens, also the longest sample."""
    pack_look_ahead: int = Field(1024, gt=0)
    """Samples that are packed together."""
    batch_timeout: float = Field(900.0, gt=0)
    """Seconds to wait for a batch of the data workers before the run ends, instead of hanging; above decode_timeout
    twice for each sample, or a slow clip ends it."""
    max_skipped: float = Field(0.2, ge=0, le=1)
    """Share of the last hundred or so samples that may be left out for their problems before the run stops; it also
    stops where all samples of a step are."""

    @model_validator(mode="after")
    def _check_packing(self):
        if self.max_tokens_per_batch is not None and (self.max_tokens or 0) > self.max_tokens_per_batch:
            raise mistake(
                "max_tokens",
                f"{self.max_tokens} is above {{max_tokens_per_batch}} {self.max_tokens_per_batch}: a sample must fit "
                "into a batch; lower the first or raise the second",
            )
        return self


class OptimizationConfig(Options):
    """Choices of the optimisation that `TrainingArguments` has no field for."""

    learning_rates: dict[Part, Annotated[float, Field(ge=0)]] = {}
    """Learning rates of parts of the model: vision_tower, merger, language_model; the others take
    training.learning_rate."""
    early_stopping_patience: Annotated[int, Positive] | None = None
    """Evaluations without a better training.metric_for_best_model after which the run ends."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is NaN or infinite, stop, or leave out the samples it comes from."""


class RunConfig(Options):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    attention_loss: AttentionLoss | None = AttentionLoss()
    optimization: OptimizationConfig = OptimizationConfig()
    training: dict[str, Any] = {}
    """Fields of transformers' `TrainingArguments` by their own names, and `sequence_parallel`: ranks that share each
    sample, see docs/long_video.md."""

    @property
    def sampling(self) -> Sampling:
        """Options by which records become samples."""
        sampling = self.data.part(Sampling)
        return sampling if sampling.max_tokens else sampling.replace(max_tokens=self.data.max_tokens_per_batch)

    @property
    def decoding(self) -> Decoding:
        """Options of decoding videos."""
        return self.data.part(Decoding)

    @property
    def supervision(self) -> Supervision:
        """Options for the parts of a sample that both losses read."""
        rows = self.attention_loss.supervision if self.attention_loss else Supervision(read_out="supervised")
        return rows.replace(label_header=self.data.label_header)

    @property
    def sequence_parallel(self) -> int:
        """Ranks that share each sample."""
        return self.training.get("sequence_parallel", 1)

    @property
    def output(self) -> Path:
        """Folder of the run."""
        return Path(self.training.get("output_dir") or "runs/swim")

    def as_yaml(self) -> str:
        """Return the YAML text that reads back as this configuration."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)

    def deepspeed(self) -> dict[str, Any] | None:
        """Return the options of DeepSpeed, see `read_options`."""
        return self.read_options("deepspeed")

    def read_options(self, key: str) -> dict[str, Any] | None:
        """Return the options that a key of `training` holds or that the JSON file it names holds; None without.

        Raises:
            ConfigError: the file cannot be read.
        """
        options = self.training.get(key)
        if not options or isinstance(options, dict):
            return options or None
        try:
            return json.loads(find_recipe(options).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"training.{key} is {options!r}, which cannot be read: {error}") from error

    @field_validator("training")
    @classmethod
    def _undo_yaml_1_1(cls, training: dict[str, Any]) -> dict[str, Any]:
        """Turn False back into the text "no" where a field is no bool."""
        types = training_fields()
        return {
            key: "no" if value is False and not re.search("bool|False|dict", types.get(key, "bool")) else value
            for key, value in training.items()
        }

    @model_validator(mode="after")
    def _check_together(self, info: ValidationInfo):
        for key, text in () if info.context == ALONE else self.mistakes():
            raise mistake(key, text)
        return self

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """Yield the keys that do not go together with others, and what is said behind them; see `mistake`."""
        for part in self.optimization.learning_rates:
            if part in self.model.freeze:
                text = "is of a part that {model.freeze} keeps from training: remove it from one of the two"
                yield f"optimization.learning_rates.{part}", text
        yield from self._source_mistakes()
        yield from self._training_mistakes()
        yield from self._evaluation_mistakes()
        yield from self._deepspeed_mistakes()

    def _source_mistakes(self) -> Iterator[tuple[str, str]]:
        train, loss = self.data.train, self.attention_loss
        sources = {f"data.train[{index}]": source for index, source in enumerate(train)}
        for key, source in (sources | {f"data.eval.{name}": file for name, file in self.data.eval.items()}).items():
            try:
                self.sampling.replace(**source.own_sampling)
            except OptionError as error:
                yield key, f"contradicts the limits of all files: {error}; change one of them"
        if train and loss and loss.mask_weight and not any(source.use_tags for source in train):
            text = "needs tagged nouns, but use_tags is false in every file of {data.train}: read the tags of one, or "
            yield "attention_loss", text + "write `attention_loss: null` to train on text alone"

    def _training_mistakes(self) -> Iterator[tuple[str, str]]:
        fields = training_fields()
        for key, value in self.training.items():
            types = fields.get(key, "").split(" | ")
            if key not in fields:
                yield f"training.{key}", f"is unknown; {nearest(key, fields)}"
            elif key in FIXED and value != FIXED[key]:
                yield f"training.{key}", f"must be {FIXED[key]}: batches are dictionaries of this project's own"
            elif key in NO_EFFECT and value != NO_EFFECT[key][0]:
                yield f"training.{key}", f"has no effect here: {NO_EFFECT[key][1]}"
            elif set(types) <= set(_TYPES) and not any(type(value) in _TYPES[name] for name in types):
                yield f"training.{key}", f"is {value!r}; expected {' or '.join(types)}"
        if isinstance(self.training.get("sequence_parallel"), int) and self.sequence_parallel < 1:
            yield "training.sequence_parallel", f"is {self.sequence_parallel}; it must be at least 1"
        if self.data.max_tokens_per_batch and self.training.get("per_device_train_batch_size", 1) != 1:
            text = "counts samples, but {data.max_tokens_per_batch} packs as many as fit: remove it"
            yield "training.per_device_train_batch_size", text

    def _evaluation_mistakes(self) -> Iterator[tuple[str, str]]:
        """Early stopping and the choice of the best checkpoint need evaluations that give the metric they go by."""
        training, metric = self.training, self.training.get("metric_for_best_model")
        if self.optimization.early_stopping_patience is not None:
            needed = [key for key in ("load_best_model_at_end", "metric_for_best_model") if not training.get(key)]
            if training.get("eval_strategy", "no") == "no":
                needed.append("eval_strategy (and save_strategy): steps or epoch")
            if needed:
                text = ", ".join(f"training.{key}" for key in needed)
                yield "optimization.early_stopping_patience", f"needs {text}"
                return
        if not training.get("load_best_model_at_end") and training.get("save_strategy") != "best":
            return
        key = "training." + ("load_best_model_at_end" if training.get("load_best_model_at_end") else "save_strategy")
        known = [
            f"eval_{name}_{metric}"
            for name, source in self.data.eval.items()
            for metric in ("loss", "text_loss", *(("mask_loss", *METRICS) if source.use_tags else ()))
        ]
        if not known:
            yield key, "chooses the best checkpoint by an evaluation, but {data.eval} names no file"
        elif metric is None:
            yield key, f"needs {{training.metric_for_best_model}}; {nearest('', known)}"
        elif f"eval_{str(metric).removeprefix('eval_')}" not in known:
            text = f"is {metric!r}, which no evaluation gives; {nearest(str(metric), known)}"
            yield "training.metric_for_best_model", text

    def _deepspeed_mistakes(self) -> Iterator[tuple[str, str]]:
        try:
            options = self.deepspeed() or {}
        except ConfigError as error:
            yield "training.deepspeed", str(error).removeprefix("training.deepspeed ")
            return
        if self.optimization.learning_rates and "optimizer" in options:  # which knows of one rate only
            text = "needs the optimizer of training.optim, but {training.deepspeed} names one of its own: remove its "
            yield "optimization.learning_rates", text + "section 'optimizer'"
        lora = self.model.lora
        if lora and lora.quantize and options.get("zero_optimization", {}).get("stage") == 3:
            text = f"{lora.quantize} keeps the weights whole on every GPU, which ZeRO-3 divides: take ZeRO-2 "
            yield "model.lora.quantize", text + "(configs/deepspeed/zero2.json) or leave it out"


ALONE = "each key alone"  # context of validation
_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),)}


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number, as YAML 1.2 does; YAML 1.1 wants a dot in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file or packaged recipe, apply `key.sub=value` overrides (values are YAML too) and check every key.

    Raises:
        ConfigError: naming the file and every mistake in it: key, value, and the nearest key or what is accepted.
    """
    path = find_recipe(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_explain_yaml(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of keys, not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    config, mistakes = _check(tree)
    if len(mistakes) > 1:
        raise ConfigError("\n  ".join([f"{path}: {len(mistakes)} mistakes", *mistakes]))
    if mistakes:
        raise ConfigError(f"{path}: {mistakes[0]}")
    return config


def _override(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r} is not of the form key.sub=value")
    *parents, last = key.strip().split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {key} is a single value and has no keys below it")
    try:
        tree[last] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r} is not valid YAML: {_explain_yaml(error)}") from error


def _explain_yaml(error: yaml.YAMLError) -> str:
    """Say in one line what the parser says in several, with an excerpt."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return at + (problem or " ".join(str(error).split()))


def _check(tree: dict) -> tuple[RunConfig | None, list[str]]:
    """Return the configuration, or None, and all mistakes: each is taken out, until the last checks have run."""
    found: dict[tuple, str] = {}

    def note(error: dict[str, Any]) -> None:
        """Add a mistake, unless it only follows from one that is known."""
        named = {path[:length] for path in named_paths(error) for length in range(1, len(path) + 1)}
        if not named & found.keys():
            found[error_path(error)] = explain(error, key_path)

    for _ in range(100):
        try:
            config = RunConfig.model_validate(tree, context=ALONE)
        except ValidationError as error:
            tree = copy.deepcopy(tree)
            for part in error.errors():
                note(part)
                _take_out(tree, error_path(part))
        else:
            for key, text in config.mistakes():
                note({"type": "mistake", "loc": (), "input": None, "ctx": {"key": key, "text": text}})
            return config, list(found.values())
    return None, list(found.values())


def _take_out(tree: Any, path: tuple[int | str, ...]) -> None:
    """Remove a key, or the list that holds an item; put a stand-in where one is missing."""
    while isinstance(path[-1], int):
        path = path[:-1]
    *parents, last = path
    for key in parents:
        tree = tree[key]
    if last in tree:
        del tree[last]
    else:
        tree[last] = "?" if parents else {}  # only sections, and names of files and models, must be given
