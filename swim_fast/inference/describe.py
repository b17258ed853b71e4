"""Ask a checkpoint about a clip in plain words, and see where it looks for a noun of the question.

The answer comes from the stock model. The maps, if any are wanted, come from one forward of the same prompt without its
answer: for each noun the fused map p of the mask loss (SWIM, arXiv 2605.18018) in stable numerics, on every temporal
patch of the clip, under the model's own causal softmax.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from swim_fast.config import AttentionLossConfig, ConfigError, RunConfig, load_config
from swim_fast.data.sample.builder import Sample, SampleOptions
from swim_fast.data.sample.encoding import Encoding
from swim_fast.data.source.errors import DataError
from swim_fast.data.video.decode_child import IMAGE_SUFFIXES
from swim_fast.data.video.reader import FrameReader, MediaInfo
from swim_fast.inference.prompt import Prompt, encode_question, find_noun, plain_question

logger = logging.getLogger(__name__)

PICTURE_WIDTH = 13.0  # inches, about
CHUNK_BYTES = 2**27  # of a clip's frames decoded at a time


@dataclass(frozen=True)
class DescribeOptions:
    """How a checkpoint is asked; None takes what it was trained with, or the defaults of training.

    Attributes:
        max_frames, fps, reader: which frames are taken and by which library, as in `SampleOptions`.
        max_new_tokens: longest answer.
        dtype: of the weights: auto (as saved), float32, bfloat16 or float16.
        device: such as "cpu" or "cuda:1"; None: the GPU if there is one.
        show: nouns of the question whose attention is drawn, a row each.
        occurrence: which of several occurrences of them, from 1; None: the last.
        layers: decoder layers whose maps are fused; None: those supervised in training.
        out: PNG of the maps; None: attention.png.
        video: mp4 of the maps over all frames of the clip; None: none.

    Raises:
        ValueError: for a value out of range, or one that only means something with ``show``.
    """

    max_frames: int | None = None
    fps: float | None = None
    reader: str | None = None
    max_new_tokens: int = 256
    dtype: str = "auto"
    device: str | None = None
    show: Sequence[str] = ()
    occurrence: int | None = None
    layers: Sequence[int] | None = None
    out: str | os.PathLike[str] | None = None
    video: str | os.PathLike[str] | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        for name in ("occurrence", "layers", "out", "video"):
            if not self.show and getattr(self, name) is not None:
                raise ValueError(f"{name} is about the attention of a noun: name one with --show NOUN")
        if self.video is not None:
            from swim_fast.viz.heatmap_video import import_av

            import_av()


@dataclass(frozen=True)
class Description:
    """What came out: the answer, and per shown noun the maps, fp32 [nouns, patches, h, w] in [0, 1]; None without."""

    answer: str
    maps: np.ndarray | None
    files: list[Path]


def describe(
    media: str | os.PathLike[str],
    question: str,
    model: str | os.PathLike[str],
    options: DescribeOptions | None = None,
) -> Description:
    """Ask a checkpoint about a video, folder of frames or image; the answer is printed while it is generated.

    Args:
        media: mp4 or another video, folder of frames, or image.
        question: plain text; ``<ins>`` tags and ``<video>`` placeholders are dropped, as training drops them.
        model: folder or hub name of a checkpoint. What `swim-fast train` left beside it (``config.yaml``) says which
            frames are taken and which layers are drawn, where ``options`` do not.
        options: see `DescribeOptions`.

    Raises:
        DataError: the clip is missing or cannot be read, or the question holds a special token of the model.
        ValueError: an empty question, a noun that is not in it, a checkpoint that is not to be had or not supported, a
            layer or device that does not exist.
    """
    options, media = options or DescribeOptions(), Path(media)
    question = plain_question(question)
    nouns = [find_noun(question, noun, options.occurrence) for noun in options.show]
    if not media.exists():
        raise DataError("there is no such file or folder", source=str(media))
    kind = "image" if media.suffix.lower() in IMAGE_SUFFIXES and not media.is_dir() else "video"
    if kind == "image" and options.video is not None:
        raise ValueError(f"{media} is an image, of which no video can be made: leave --video out")
    trained = trained_as(model)
    sampling = trained.sample_options() if trained else SampleOptions()
    given = {name: getattr(options, name) for name in ("max_frames", "fps", "reader")}
    sampling = dataclasses.replace(sampling, **{name: value for name, value in given.items() if value is not None})
    loss = trained.attention_loss if trained else AttentionLossConfig()
    if options.layers is not None:
        loss = dataclasses.replace(loss, layers=list(options.layers))

    with FrameReader(sampling.reader, sampling.decode_timeout) as reader:
        info = reader.info(media, kind)  # before the minutes that a large checkpoint takes
        processor = _load_processor(model)
        prompt = encode_question(processor, sampling, reader, media, kind, info, question, nouns)
        loaded = _load_model(model, options)
        maps = noun_maps(loaded, processor, prompt.encoding, loss) if nouns else None
        answer = generate_answer(loaded, processor, prompt.encoding, options.max_new_tokens)
        files, labels = [], [question[slice(*noun)] for noun in nouns]
        if maps is not None:
            files.append(draw_maps(options.out or "attention.png", prompt, maps, labels, question, answer))
        if options.video is not None:
            files.append(_write_video(Path(options.video), prompt, maps, labels, _all_frames(reader, media, info)))
    return Description(answer, maps, files)


def trained_as(model: str | os.PathLike[str]) -> RunConfig | None:
    """The configuration of the run that made a checkpoint; None if it lies beside none that can be read."""
    folder = Path(model)
    folders = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    file = next((at / "config.yaml" for at in folders if (at / "config.yaml").is_file()), None)
    if file is None:
        return None
    try:
        config = load_config(file)
    except ConfigError as error:
        logger.warning("%s is not used, frames and layers are the defaults: %s", file, error)
        return None
    logger.info("frames, layers and fusion are those of training (%s), where no option says otherwise", file)
    return config


@torch.no_grad()
def noun_maps(model, processor, encoding: Encoding, loss: AttentionLossConfig) -> np.ndarray:
    """The fused map of each noun of a prompt on each temporal patch, averaged over the noun's tokens.

    Afterwards the model is as it was.

    Args:
        model: stock, not attached.
        encoding: of the prompt, with at least one noun.
        loss: which layers, which fusion (of "none" the product is shown) and whether the noun's own rows or those that
            predict it. The other choices do not matter here.

    Returns:
        fp32 [nouns, patches, h, w], from 0 to 1 in each patch of each token.

    Raises:
        ValueError: a model family without adapter, or a layer that it does not have.
        DataError: a noun without a token.
    """
    from swim_fast.modeling.noun_attention import attach_noun_attention, detach_noun_attention, get_attached_layers
    from swim_kernels import GridPairs
    from swim_kernels import grid_prediction as grid_prediction

    earlier = 1 if loss.query_position == "predictor" else 0
    tokens = [encoding.noun_tokens(number) for number in range(len(encoding.nouns))]
    positions = [token - earlier for noun in tokens for token in noun]
    rows = [(position, 0, position + 1, 0) for position in positions]
    inputs, queries = _model_inputs(model, processor, encoding, rows)
    attach_noun_attention(model, loss.layers or None)  # a run without maps names none
    logger.info("attention of layers %s", ", ".join(map(str, get_attached_layers(model))))
    try:  # the maps need no logits
        maps = model(**inputs, noun_queries=queries, use_cache=False, logits_to_keep=1).attentions
    finally:
        detach_noun_attention(model)
    height, width = encoding.patch_grid
    num_rows, num_patches = len(rows), len(encoding.visual()) // (height * width)
    row = torch.arange(num_rows).repeat_interleave(num_patches)
    start = torch.arange(num_patches).repeat(num_rows) * height * width
    pairs = GridPairs.from_rows(row, start, [(height, width)] * len(row), torch.zeros_like(row))
    fusion = "mean" if loss.fusion == "mean" else "product"
    cells = grid_prediction(maps, pairs.to(maps[0].device), fusion=fusion)
    by_row = cells.view(num_rows, num_patches, height, width).cpu()
    return torch.stack([part.mean(0) for part in by_row.split([len(noun) for noun in tokens])]).numpy()


@torch.no_grad()
def generate_answer(model, processor, encoding: Encoding, max_new_tokens: int) -> str:
    """The greedy answer to a prompt, printed while it is generated."""
    from transformers import TextStreamer

    inputs, _ = _model_inputs(model, processor, encoding)
    found = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,  # of sampling: what a checkpoint says of them would only give warnings
        top_p=None,
        top_k=None,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return processor.tokenizer.decode(found[0, len(encoding) :], skip_special_tokens=True).strip()


def draw_maps(
    path: str | os.PathLike[str], prompt: Prompt, maps: np.ndarray, labels: Sequence[str], question: str, answer: str
) -> Path:
    """Draw the first frame of every temporal patch, and below it the map of each noun, into a PNG.

    Args:
        maps: [nouns, patches, h, w].
        labels: the nouns.

    Returns:
        The path of the PNG.
    """
    from swim_fast.viz.heatmap_grid import HeatmapColumn, heatmap_grid

    columns = []
    for number, frames in enumerate(prompt.patches()):
        label = ""
        if prompt.info.num_frames > 1:
            names = ", ".join(map(str, frames))
            label = f"frame{'s' * (len(frames) > 1)} {names} · {frames[0] / prompt.info.fps:.1f} s"
        first = prompt.pixels[number * prompt.temporal_patch_size]
        columns.append(HeatmapColumn(first, None, [of_noun[number] for of_noun in maps], label))
    fit = max(1, int(PICTURE_WIDTH / (1.75 * prompt.info.width / prompt.info.height)))
    lines = math.ceil(len(columns) / fit)
    title = f"“{textwrap.shorten(question, 160)}”" + (f"  —  “{textwrap.shorten(answer, 160)}”" if answer else "")
    heatmap_grid(
        columns,
        path,
        title=title,
        map_labels=[f"“{textwrap.shorten(label, 24)}”" for label in labels],
        mask_label="frame" if prompt.info.num_frames > 1 else "image",
        per_line=math.ceil(len(columns) / lines),
    )
    return Path(path)


def _write_video(
    path: Path, prompt: Prompt, maps: np.ndarray, labels: Sequence[str], frames: Iterator[np.ndarray]
) -> Path:
    from tqdm import tqdm

    from swim_fast.viz.heatmap_video import write_heatmap_video

    centres = [float(np.mean(frames)) for frames in prompt.patches()]
    bar = tqdm(frames, desc="drawing", unit="frame", total=prompt.info.num_frames, leave=False)
    write_heatmap_video(path, bar, maps, centres, labels, prompt.info.fps)
    return path


def _all_frames(reader: FrameReader, media: Path, info: MediaInfo) -> Iterator[np.ndarray]:
    """Every frame of a clip in order, decoded some at a time."""
    step = max(1, CHUNK_BYTES // (3 * info.height * info.width))
    for first in range(0, info.num_frames, step):
        yield from reader.frames(media, range(first, min(first + step, info.num_frames)))


def _model_inputs(model, processor, encoding: Encoding, rows: Sequence[tuple[int, int, int, int]] = ()):
    """Keyword arguments of the model's forward, and the queries of the rows (`Sample.rows`), on the model's device."""
    from swim_fast.data.batch.collation import Collator, model_inputs

    sample = Sample("", encoding.inputs, rows=list(rows), key_sets=[encoding.visual()] if rows else [])
    batch = Collator(processor)([sample])
    return model_inputs(batch, model.device), batch["noun_queries"].to(model.device)


def _load_processor(path: str | os.PathLike[str]):
    from transformers import AutoProcessor

    with _checkpoint_errors(path):
        processor = AutoProcessor.from_pretrained(path)
    if not hasattr(processor, "video_processor"):
        raise ValueError(f"the checkpoint {str(path)!r} takes no video: it has no video processor")
    return processor


def _load_model(path: str | os.PathLike[str], options: DescribeOptions):
    from transformers import AutoModelForImageTextToText

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from error
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    with _checkpoint_errors(path):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    return model.to(device).eval()


@contextmanager
def _checkpoint_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """What transformers says of a checkpoint that it cannot load, in a line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"--model {str(path)!r} is no checkpoint that can be loaded: {reason}") from error
