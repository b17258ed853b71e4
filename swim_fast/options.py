"""Every option, said once: its name, type, default, limits and meaning.

YAML sections (`swim_fast.config`), command lines (`swim_fast.jobs`), their `--help` and docs/configuration.md are made
of these classes, and the functions that use an option take the object that holds it. So a new option is one field here
and the line that reads it. Nothing heavy is imported: a mistake is told before torch is loaded.
"""

import os
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from swim_fast.errors import OptionError, explain, nearest

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

# Grounding metrics, in the order in which their sums travel; behind each set comes the number of its pairs.
METRICS = ("pointing_accuracy", "mass_in_mask", "soft_iou")  # of every evaluation, beside the losses
RANKING_METRICS = {  # name -> heading of a column; of `evaluate grounding`, as they cost a sort of every mask's pixels
    "gamepoint_top_1pct": "GP@1%",
    "gamepoint_top_5pct": "GP@5%",
    "gamepoint_top_10pct": "GP@10%",
    "gamepoint_top_1": "GP@1",
    "gamepoint_top_10": "GP@10",
    "gamepoint_top_100": "GP@100",
    "average_precision": "AP",
    "auc": "AUC",
    "nss": "NSS",
    "precision_at_75": "P@0.75",
}

Base = TypeVar("Base", bound="Options")
File = Annotated[str, BeforeValidator(lambda path: os.fspath(path) if isinstance(path, os.PathLike) else path)]
Positive = Field(gt=0)
PIXEL_LIMITS = ("min_pixels", "max_pixels")  # of sampling, of which a source may have its own


class _OptionsClass(ModelMetaclass):
    """Lets constructors raise `OptionError`; validation of nested options does not come through here."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise OptionError("; ".join(explain(mistake, key_path) for mistake in error.errors())) from None


class Options(BaseModel, metaclass=_OptionsClass):
    """Base of all options: immutable, checked when made, unknown names refused.

    Raises:
        OptionError: naming each option, its value and what would be accepted.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    words: ClassVar[tuple[str, ...]] = ()  # on a command line, the options without dashes, in order
    example: ClassVar[str] = ""  # of a command line, behind `swim-fast JOB`
    trained: ClassVar[frozenset[str]] = frozenset()  # options that default to those of the checkpoint's training

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise mistake(str(key), f"is unknown; {nearest(str(key), cls.model_fields)}")
        return values

    def given(self) -> dict[str, Any]:
        """Return the values that were given, without those that are defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def replace(self, **changes: Any):
        """Return a checked copy with other values."""
        return type(self)(**{**self.given(), **changes})

    def part(self, cls: type[Base]) -> Base:
        """Return the options of a base class alone."""
        values = {name: getattr(self, name) for name in cls.model_fields}
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return cls(**{n: v for n, v in values.items() if n in self.model_fields_set or v != defaults[n]})


def mistake(key: str, text: str) -> PydanticCustomError:
    """Return the error that a validator raises about an option: what is said behind its name.

    Args:
        key: name of the option; "" in a validator of that option.
        text: other options of the same class stand in braces, so that they are spelled as the user knows them.
    """
    return PydanticCustomError("mistake", "{key} {text}", {"key": key, "text": text})


def key_path(path: tuple[int | str, ...]) -> str:
    """Spell a path of keys as in YAML: `data.train[0].path`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def unwrap(annotation: Any) -> Any:
    """Return the type of an option without limits and without None."""
    if get_origin(annotation) is Annotated:
        return unwrap(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return unwrap(next(kind for kind in get_args(annotation) if kind is not type(None)))
    return annotation


class InputFile(Options):
    """Records."""

    file: File
    """JSON list or JSONL of records."""


class Media(Options):
    """Media of records."""

    media: File | None = None
    """Folder that relative media paths start from; without one, the folder of the file."""


class Limited(Options):
    """Choice of records."""

    limit: Annotated[int, Positive] | None = None
    """Use only so many records, from the first."""


class Excerpt(Options):
    """Part of each record that is used."""

    use_tags: bool = True
    """Read tagged nouns and their masks; without, the tags are removed and the record trains on text alone."""
    turns: Annotated[int, Positive] | None = None
    """Use only so many exchanges of question and answer, from the first."""


class Source(Media, Limited, Excerpt):
    """One file of a mixture."""

    path: File
    """JSON list or JSONL of records."""
    weight: float = Field(1.0, gt=0)
    """Passes over the file per epoch: 2 takes every record twice, 0.5 a random half, another one each epoch."""
    name: str | None = None
    """Name of the file in tables; without one, the file's own."""
    min_pixels: Annotated[int, Positive] | None = None
    """Least pixels of a frame of this file, in place of the min_pixels of all."""
    max_pixels: Annotated[int, Positive] | None = None
    """Most pixels of a frame of this file, in place of the max_pixels of all."""

    @property
    def own_sampling(self) -> dict[str, int]:
        """Options of sampling that this file has its own values of."""
        return {name: value for name, value in self.given().items() if name in PIXEL_LIMITS and value is not None}


class Sampling(Options):
    """Text, frames, pixels and tokens of a sample."""

    system_prompt: str | None = None
    """System turn of records that have none: a text, or "" for no such turn; without it, the chat template's own."""
    max_frames: int = Field(32, ge=2)
    """Most frames taken from a video; two make one temporal patch."""
    fps: Annotated[float, Positive] | None = None
    """Frames taken per second of a video, at least the annotated and at most max_frames; without it, max_frames of any
    video."""
    min_pixels: Annotated[int, Positive] | None = None
    """Least pixels of a frame after resizing; without it, the processor's own limit."""
    max_pixels: Annotated[int, Positive] | None = None
    """Most pixels of a frame after resizing; without it, the processor's own limit."""
    total_pixels: Annotated[int, Positive] | None = None
    """Most pixels of all frames of a video together: its frames are made smaller, down to min_pixels, then fewer."""
    max_tokens: Annotated[int, Positive] | None = None
    """Longest sample in tokens; a longer one gets fewer frames."""
    seconds_per_patch: Literal["measured", "one"] = "measured"
    """Time from one temporal patch to the next, of which the model's positions are made: that of the frames taken
    (`measured`), or one second in any video (`one`), as the released code has it."""

    @model_validator(mode="after")
    def _check_pixels(self):
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise mistake("min_pixels", f"{self.min_pixels} is above {{max_pixels}} {self.max_pixels}")
        if self.min_pixels and self.total_pixels and 2 * self.min_pixels > self.total_pixels:
            text = f"{self.total_pixels} is below two frames of {{min_pixels}} {self.min_pixels}"
            raise mistake("total_pixels", text)
        return self


class AsRun(Options):
    """A run whose samples are meant."""

    config: File | None = None
    """YAML file of a run, whose options of samples hold where none are given here; without it, the one beside the
    model, if there is one."""


class Decoding(Options):
    """Decoding of videos."""

    reader: Literal["decord", "torchcodec", "pyav"] = "decord"
    """Library that decodes video."""
    decode_timeout: float = Field(60.0, gt=0)
    """Seconds that a clip may take to open, and again to decode."""


class Labels(Options):
    """Tokens of the text loss."""

    label_header: bool = False
    """Train on the header that the chat template writes before each answer too, as the released code does."""


class NounRows(Options):
    """Rows of attention that belong to a tagged noun, and their masks."""

    query_position: Literal["noun", "predictor"] = "noun"
    """Rows of the noun's own tokens (`noun`), or of the tokens before them, which predict them (`predictor`)."""
    softmax: Literal["frame", "visual", "causal", "full"] = "frame"
    """Tokens over which a row's softmax runs: those of one temporal patch (`frame`), all visual tokens (`visual`), all
    up to its own, as the model's own attention (`causal`), or all of the sequence (`full`)."""
    supervise: Literal["either", "second"] = "either"
    """Frames of a temporal patch whose masks supervise it: `either`, with the union of both, or the `second` alone, as
    in the released code."""

    @property
    def over(self) -> str:
        """Range of the rows' softmax, as `NounQueries.over`."""
        return "set" if self.softmax in ("frame", "visual") else "range"


class Supervision(NounRows, Labels):
    """Labels, and rows and columns of attention, that a sample asks for."""

    read_out: Literal["all", "supervised"] = "all"
    """Visual tokens at which maps are read out: `all`, which the normaliser of the released code needs, or those of the
    temporal patches in which any object has a mask (`supervised`). A softmax over `frame` or `visual` tokens is read
    out on these."""
    question_rows: bool = False
    """Rows of the tokens of questions, too, for losses of their attention to sets of keys."""


class Maps(NounRows):
    """Attention maps of tagged nouns."""

    backend: Literal["auto", "eager", "torch", "triton"] = "auto"
    """Implementation of the kernels; `auto` takes Triton on a GPU and torch elsewhere."""


class AttentionLoss(Maps):
    """SWIM's mask loss (arXiv 2605.18018); `null` in place of the section trains on text alone, without any map."""

    layers: list[int] | None = None
    """Decoder layers whose maps are supervised; without them, every fifth counted back from the last."""
    text_weight: float = Field(0.05, ge=0)
    """Weight of the text loss."""
    mask_weight: float = Field(1.0, ge=0)
    """Weight of the mask loss; at 0 maps are measured but not trained."""
    image_weight: float = Field(0.0, ge=0)
    """Weight of AVAR's loss by which the tokens of a question look more at the video or image (arXiv 2603.03825; 0.15
    there). It needs no masks, and is of the same layers."""
    system_weight: float = Field(0.0, ge=0)
    """Weight of AVAR's loss by which they look less at what stands before the question (0.15 there)."""
    fusion: Literal["mean", "add", "product", "none"] = "mean"
    """Fusion of the layers' maps into one; `none` gives each layer a loss of its own, averaged."""
    prediction: Literal["probability", "min_max", "released"] = "probability"
    """Prediction compared with the mask: the attention probability, the map scaled to 0 … 1 in each temporal patch
    (`min_max`), or the same with the released code's two epsilons (`released`)."""
    criterion: Literal["bce", "focal", "iou", "dice", "kl", "mass", "klal"] = "bce"
    """Criterion of map against mask; `klal` is the KL attention loss (arXiv 2511.12738), over all patches of a row
    at once."""
    resolution: Literal["mask", "grid"] = "mask"
    """Maps are enlarged to the mask (`mask`), or the mask is averaged down to the grid of visual tokens (`grid`)."""
    fused: bool = True
    """Compute attention output and map of a layer in one autograd node, where its attention allows it."""
    provider: Literal["auto", "torch_cuda", "torch_cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4"] = "auto"
    """Flash attention of that node where the model's is `sdpa`, which is several: `auto` is torch's own. `sdpa` by
    itself may take cuDNN's on Hopper, which this node takes as `torch_cudnn`; neither has been measured yet."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_new_key(cls, values: Any) -> Any:
        if isinstance(values, dict) and "numerics" in values:
            remedy = "write `prediction: min_max` for stable, `prediction: released` for paper; and name `fusion` and "
            raise mistake("numerics", f"is gone: {remedy}`softmax`, whose defaults are now mean and frame")
        return values

    @model_validator(mode="after")
    def _check(self):
        if self.prediction == "released" and self.softmax == "frame":
            text = "released normalises over the whole video, which {softmax} frame does not see: choose visual, causal"
            raise mistake("prediction", f"{text} or full")
        if self.criterion == "klal":
            if self.fusion not in ("none", "mean"):
                raise mistake("fusion", "must be none, as published, or mean with {criterion} klal")
            if self.prediction != "probability":
                raise mistake("prediction", "must be probability with {criterion} klal")
            if self.softmax not in ("visual", "frame"):
                raise mistake("softmax", "must be visual, as published, or frame with {criterion} klal")
        if self.layers == []:
            remedy = "name layers, leave it out for every fifth, or write `attention_loss: null` to train on text alone"
            raise mistake("layers", f"is empty: {remedy}")
        if self.text_weight == self.mask_weight == self.image_weight == self.system_weight == 0:
            raise mistake("text_weight", "and {mask_weight} are both 0: nothing would be trained")
        return self

    @property
    def shown_fusion(self) -> str:
        """Fusion of layers in pictures and evaluation, where `none` gives no map to show."""
        return "product" if self.fusion == "none" else self.fusion

    @property
    def supervision(self) -> Supervision:
        """Parts that samples must hold for this loss."""
        read_out = "all" if self.prediction == "released" else "supervised"
        return Supervision(**self.part(NounRows).given(), read_out=read_out, question_rows=self.asks_questions)

    @property
    def asks_questions(self) -> bool:
        """True if the attention of the questions' tokens is trained."""
        return self.image_weight > 0 or self.system_weight > 0


class Lora(Options):
    """Low-rank adapters through peft (LoRA, arXiv 2106.09685; quantised, QLoRA, arXiv 2305.14314)."""

    rank: int = Field(16, gt=0)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters, divided by the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of linear layers that get adapters; without them, all of the language model but its head."""
    quantize: Literal["nf4", "int8"] | None = None
    """Quantisation of the frozen weights by bitsandbytes."""


class Weights(Options):
    """Options of loading a checkpoint."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` takes the checkpoint's own."""
    attention: str | None = None
    """Implementation of attention, as `attn_implementation` of transformers: sdpa, eager, flash_attention_2, …"""
    position_ids: Literal["pretraining", "library"] = "pretraining"
    """Text behind a video is numbered from the video's largest position on, time included, as when the model was
    pretrained (`pretraining`), or as the installed transformers does it (`library`); see docs/method.md."""


class Inference(Weights):
    """Options of running a model without training."""

    attention: str | None = "sdpa"
    """Implementation of attention, as `attn_implementation` of transformers: sdpa, eager, flash_attention_2, …"""
    device: str | None = None
    """Device of the weights: cpu, cuda, cuda:1, …; without one, the GPU if there is one."""


class Requests(Options):
    """Requests to an OpenAI-compatible API; the key is read from OPENAI_API_KEY."""

    base_url: str | None = None
    """Address of the API, such as http://localhost:8000/v1; without one, OpenAI's own."""
    concurrency: int = Field(16, gt=0)
    """Most requests under way at the same time."""
    timeout: float = Field(60.0, gt=0)
    """Seconds that one request may take."""
    retries: int = Field(8, ge=0)
    """Repetitions of a request after a time-out, a lost connection, a rate limit or an error of the server."""
    backoff: float = Field(1.0, gt=0)
    """Seconds before the first retry, doubled for each further one; a longer Retry-After of the server is honoured."""
    temperature: float | None = None
    """Sampling temperature; without one, the endpoint's own."""


class Endpoint(Requests):
    """A language model behind an API."""

    model: str
    """Name of the model at the endpoint."""


class Asking(Requests):
    """Answers of a language model."""

    attempts: int = Field(3, gt=0)
    """Answers per record until one is valid."""
    journal: File | None = None
    """File of the answers paid for, which are not asked for again; without one, it lies beside the output."""

    def endpoint(self, model: str) -> Endpoint:
        """Return the endpoint of a model."""
        return Endpoint(model=model, **self.part(Requests).given())
