"""The options of each job of the command line."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from swim_fast.options import (
    Asking,
    AsRun,
    Decoding,
    Excerpt,
    File,
    Inference,
    InputFile,
    Limited,
    Maps,
    Media,
    NounRows,
    Options,
    Positive,
    Sampling,
    Supervision,
    mistake,
)

AS_TRAINED = frozenset({*Sampling.model_fields, *Decoding.model_fields, "position_ids"})


class Train(Options):
    """Fine-tune a model as a YAML file says."""

    words = ("config", "overrides")
    example = "run.yaml training.max_steps=100 training.output_dir=runs/first"
    config: File
    """YAML file; see configs/ and docs/configuration.md."""
    overrides: list[str] = []
    """Values that replace those of the file: key=value, such as training.learning_rate=1e-5."""
    resume: bool = False
    """Resume from the last checkpoint in training.output_dir."""
    dry_run: bool = False
    """Say what a step will hold, without weights or GPU."""
    gpus: Annotated[int, Positive] | None = None
    """Number of GPUs of the dry run; without it, $WORLD_SIZE or 1."""
    gpu_memory: float = Field(80.0, gt=0)
    """GiB of each GPU of the dry run."""
    limit: int = Field(2000, gt=0)
    """Records whose lengths the dry run measures."""


class Doctor(Options):
    """Say what is installed, what works here, and what installs the rest."""

    example = "--format json"

    format: Literal["text", "json"] = "text"
    """One screen, or JSON for a report."""


class Completion(Options):
    """Print the completion script of a shell, to be read at its start."""

    words = ("shell",)
    example = "bash >> ~/.bash_completion"
    shell: Literal["bash", "zsh", "fish"]
    """Shell to complete in."""


class ConfigInit(Options):
    """Write a commented YAML file for your records and GPUs."""

    words = ("out",)
    example = "run.yaml --data data/train.jsonl --media clips --gpus 1 --gpu-memory 24"
    out: File = "run.yaml"
    """File to write; one that exists is left as it is."""
    data: File
    """Records to train on."""
    media: File | None = None
    """Folder of their clips and images; without it, that of the records."""
    eval: File | None = None
    """Records to evaluate on, whose media lie in the same folder."""
    model: File = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Checkpoint to start from: folder or name on the Hugging Face hub."""
    gpus: int | None = Field(None, ge=0)
    """Number of GPUs, 0 for a CPU; without it, those of this machine."""
    gpu_memory: float | None = Field(None, gt=0)
    """GiB of each GPU; without it, that of this machine's, else 80."""
    run: File = "runs/swim"
    """Folder that the run will write to."""


class Demo(Options):
    """Render clips, train a tiny model with and without the mask loss, draw pictures."""

    words = ("config", "overrides")
    example = "training.seed=1 training.output_dir=runs/demo_1"
    config: File = "configs/demo.yaml"
    """YAML file of the run."""
    overrides: list[str] = []
    """Values that replace those of the file: key=value."""
    train_clips: int = Field(1000, gt=0)
    """Clips to train on."""
    heldout_clips: int = Field(60, gt=0)
    """Clips to evaluate on."""


class Report(Inference):
    """Write one web page about finished or running runs: settings, curves, and where they look in held-out clips."""

    words = ("runs",)
    example = "runs/with_attention_loss runs/text_loss_only --out report.html"
    runs: list[str] = Field(min_length=1)
    """Output folders of training, shown side by side; the clips are those of the first one's data.eval."""
    out: File | None = None
    """Page to write; report.html in the first folder without one."""
    clips: int = Field(8, ge=0)
    """Held-out clips of the gallery, evenly spaced over the sets; 0 loads no model."""
    max_new_tokens: int = Field(64, gt=0)
    """Longest answer in tokens."""


class Describe(Inference, Sampling, Decoding):
    """Ask a checkpoint about a video or image, and draw where it looks."""

    words = ("media", "question")
    example = 'clip.mp4 "What is the dog doing?" --model runs/swim --show dog --out dog.png'
    trained = AS_TRAINED
    media: File
    """Video, folder of frames, or image."""
    question: str
    """Question in plain text."""
    model: File
    """Checkpoint: folder or name on the Hugging Face hub."""
    max_new_tokens: int = Field(256, gt=0)
    """Longest answer in tokens."""
    show: list[str] = []
    """Noun of the question whose attention is drawn; may be repeated."""
    occurrence: Annotated[int, Positive] | None = None
    """Occurrence of the nouns that is meant, from 1; without it, the last."""
    layers: list[int] | None = None
    """Decoder layers whose maps are fused; without them, those supervised in training."""
    out: File | None = None
    """PNG of the attention; attention.png without one."""
    video: File | None = None
    """mp4 of the attention over all frames of the video."""

    @model_validator(mode="after")
    def _check_nouns(self):
        for name in ("occurrence", "layers", "out", "video"):
            if not self.show and getattr(self, name) is not None:
                raise mistake(name, "is about the attention of a noun: name one with {show} NOUN")
        return self


class Check(InputFile, Media, Limited, Excerpt, AsRun, Sampling, Decoding, Supervision):
    """Read every record of a file and report every problem."""

    words = ("file",)
    example = "data/train.jsonl --media clips --model Qwen/Qwen2.5-VL-7B-Instruct"
    trained = AS_TRAINED | frozenset(Supervision.model_fields)
    model: File | None = None
    """Checkpoint whose processor is checked too (tokens, lengths)."""
    decode: bool = True
    """Open the videos; without, only what shows in the file is checked."""
    workers: int = Field(2, ge=0)
    """Processes that read; 0 reads in this one."""


class Show(InputFile, Media, Excerpt, AsRun, Sampling, Decoding, Supervision):
    """Show one record as training sees it: frames, masks, tagged nouns, tokens."""

    words = ("file", "index")
    example = "data/train.jsonl 0 --model Qwen/Qwen2.5-VL-7B-Instruct --out record.html"
    trained = AS_TRAINED | frozenset(Supervision.model_fields)
    index: int
    """Index of the record in the file, from 0."""
    model: File
    """Checkpoint whose processor and tokenizer are used."""
    out: File = "record.html"
    """Page to write, or PNG of the frames alone."""

    @model_validator(mode="after")
    def _check_out(self):
        if not self.out.lower().endswith((".html", ".png")):
            raise mistake("out", f"is {self.out!r}; it must end in .html (the whole record) or .png (its frames)")
        return self


class Import(Limited, Decoding):
    """Make records of another data set: DAVIS, MeViS, SA-V, COCO, CVAT and others."""

    words = ("format", "source", "out")
    example = "davis DAVIS data/davis.jsonl --names names.json"
    format: Literal[
        "davis",
        "youtube-vos",
        "masks",
        "sa-v",
        "sam2",
        "ref-youtube-vos",
        "mevis",
        "revos",
        "coco",
        "youtube-vis",
        "labelme",
        "labelme-video",
        "cvat",
        "videorefer",
        "pixelrefer",
        "ms-swift",
        "llama-factory",
    ]
    """Format of the source; see docs/import.md."""
    source: File
    """Folder or file of the data set."""
    out: File
    """Records to write: a JSON list if it ends in .json, else JSONL."""
    media: File | None = None
    """Folder of the clips, folders of frames or images, or the one clip; without it, where the data set has them."""
    names: File | None = None
    """JSON of what the objects are called, {clip: {object: name}}, or {object: name} for all clips."""
    clips: File | None = None
    """Text file of the clips to take, a name a line."""
    question: list[str] = []
    """Question in place of the built-in ones, with {name} where the tagged name goes; may be repeated."""
    answer: list[str] = []
    """Answer to the questions, or as many as questions; may be repeated."""
    turns: int = Field(1, gt=0)
    """Names of a clip that one record asks about, a turn each."""
    first: int = Field(0, ge=0)
    """Number of a clip's first frame in the names of the masks."""
    every: Annotated[int, Positive] | None = None
    """Frames of a clip from one mask to the next: with 4, mask 1 belongs to frame 4; without it, 4 for sa-v, else 1."""
    progress: bool = True
    """Show a progress bar."""

    @model_validator(mode="after")
    def _check_templates(self):
        for text in self.question:
            if text.count("{name}") != 1 or "<ins>" in text:
                raise mistake("question", "must have the word name in braces once, and no tags of its own")
        if len(self.answer) not in (0 if not self.question else 1, 1, len(self.question)):
            raise mistake("answer", f"is given {len(self.answer)} times: give one, or one for each {{question}}")
        return self


class Build(InputFile, Limited, Asking):
    """Replace the placeholders of raw VideoRefer records by expressions with a tagged noun."""

    words = ("file", "out")
    example = "videorefer.json nl_refer.jsonl"
    out: File
    """NL-Refer file to write: a JSON list if it ends in .json, else JSONL."""
    rewriter: Literal["rules", "openai"] = "rules"
    """Rules, offline and without cost, or a language model behind an API (`openai`)."""
    model: str | None = None
    """Name of the language model at the endpoint."""
    bind: Literal["number", "order"] = "number"
    """Masks belong to placeholders by number or by order."""
    max_words: int = Field(15, gt=0)
    """Most words of an expression."""
    review: File | None = None
    """File of the failures; without one, it lies beside the output."""
    price_in: float = Field(0.0, ge=0)
    """Price of a million tokens in, in any currency."""
    price_out: float = Field(0.0, ge=0)
    """Price of a million tokens out."""
    dry_run: bool = False
    """Write and ask nothing: count, and estimate tokens and cost."""
    progress: bool = True
    """Show a progress bar."""

    @model_validator(mode="after")
    def _check_model(self):
        if (self.rewriter == "openai") != (self.model is not None):
            raise mistake("rewriter", "openai needs a {model}, and {model} needs {rewriter} openai")
        return self


class Synonyms(InputFile, Limited):
    """Write a variant of a set with synonyms of the tagged nouns."""

    words = ("file", "out")
    example = "nl_refer.jsonl synonyms.jsonl --missing drop"
    out: File
    """File to write: a JSON list if it ends in .json, else JSONL."""
    table: File | None = None
    """TSV of one's own: noun, tab, synonyms with commas; goes before the one built in."""
    missing: Literal["keep", "drop"] = "keep"
    """Treatment of records without a known synonym."""
    seed: int = 0
    """Another seed, another choice among several synonyms."""


class Stats(InputFile, Media, Limited, Decoding):
    """Count nouns, tags, mask areas and annotated frames of a set."""

    words = ("file",)
    example = "nl_refer.jsonl --top 10 --plot stats.png"
    top: int = Field(20, gt=0)
    """Nouns to show."""
    plot: File | None = None
    """PNG of the distributions."""


class Evaluation(InputFile, Media, Limited, Inference, AsRun, Sampling, Decoding):
    """A checkpoint run over a file."""

    words = ("model", "file")
    trained = AS_TRAINED
    model: File
    """Checkpoint: folder or name on the Hugging Face hub."""
    out: File
    """Folder of predictions and results; a run that was ended resumes there."""
    folder_fps: float = Field(1.0, gt=0)
    """Frames per second of clips that are folders of frames, which do not say; training takes 1."""
    batch_size: int = Field(4, gt=0)
    """Samples at a time."""
    workers: int = Field(2, ge=0)
    """Processes of each rank that decode clips; 0 decodes between the batches."""


class Questions(Evaluation):
    """VideoRefer-Bench-Q: multiple choice."""

    example = "runs/swim VideoRefer-Bench-Q.json --media clips --out runs/bench_q"

    by: Literal["generation", "likelihood"] = "generation"
    """The letter in the greedy answer, or the option that the model finds likeliest."""
    max_new_tokens: int = Field(16, gt=0)
    """Longest answer in tokens."""


class Descriptions(Evaluation, Asking):
    """VideoRefer-Bench-D: descriptions, scored by a judge."""

    example = "runs/swim VideoRefer-Bench-D.json --media clips --out runs/bench_d"

    max_new_tokens: int = Field(256, gt=0)
    """Longest description in tokens."""
    frame_mode: Literal["text", "single", "multi"] = "text"
    """Way of pointing the object out, recorded with the scores: in words alone, or also drawn into one frame or all."""
    judge_model: str | None = None
    """Name of the judge at the endpoint; without one, predictions only."""
    judge_only: bool = False
    """Judge the predictions that the output folder holds; load no model."""
    temperature: float | None = 0.0
    """Sampling temperature of the judge."""

    @model_validator(mode="after")
    def _check_judge(self):
        if self.judge_only and self.judge_model is None:
            raise mistake("judge_only", "needs a {judge_model}")
        return self


class Grounding(Evaluation, Maps):
    """Attention of tagged nouns inside their masks, by layer."""

    example = "runs/swim heldout.jsonl --out runs/grounding --layers supervised"

    trained = AS_TRAINED | {"fusion", *NounRows.model_fields}
    layers: str | list[int] = "all"
    """Layers to look at: all, supervised, or indices such as 2,7,12."""
    fusion: Literal["mean", "add", "product"] = "mean"
    """Fusion of the supervised layers' maps into one."""

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, layers: Any) -> Any:
        if not isinstance(layers, str) or layers in ("all", "supervised"):
            return layers
        try:
            return [int(part) for part in layers.split(",")]
        except ValueError:
            raise mistake("", f"is {layers!r}; give all, supervised or indices such as 2,7,12") from None


class Analyze(Grounding):
    """Attention of the words of referring expressions: nouns, attributes and function words, by layer."""

    example = "runs/swim heldout.jsonl --out runs/words --against Qwen/Qwen2.5-VL-7B-Instruct"
    against: File | None = None
    """Checkpoint to compare with, such as the one before training; run with the same samples, layers and softmax."""
