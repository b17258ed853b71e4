"""Ask a checkpoint about a clip in plain words, and see where it looks for a noun of the question.

The answer comes from the stock model. The maps, if any are wanted, come from one forward of the same prompt without its
answer, see `swim_fast.inference.noun_maps`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.source.errors import DataError
from swim_fast.data.video.images import IMAGE_SUFFIXES
from swim_fast.errors import OptionError
from swim_fast.inference.generation import generate
from swim_fast.inference.loading import choose_inference, choose_sampling, load_model, load_processor, trained_as
from swim_fast.inference.noun_maps import compute_noun_maps
from swim_fast.inference.prompt import Prompt, encode_question, find_noun, plain_question
from swim_fast.jobs import Describe
from swim_fast.options import AttentionLoss
from swim_fast.progress_bar import ProgressBar
from swim_fast.viz.heatmap_grid import HeatmapColumn, heatmap_grid
from swim_fast.viz.heatmap_video import import_av, write_heatmap_video

PICTURE_WIDTH = 13.0  # inches, about
CHUNK_BYTES = 2**27  # of a clip's frames decoded at a time


@dataclass(frozen=True)
class Description:
    """The answer, and per shown noun the maps, fp32 [nouns, patches, h, w] in [0, 1]; None without."""

    answer: str
    maps: np.ndarray | None
    files: list[Path]


def describe(options: Describe) -> Description:
    """Ask a checkpoint about a video, folder of frames or image; the answer is printed while it is generated.

    `<ins>` tags and `<video>` placeholders of the question are dropped, as training drops them. The configuration that
    `swim-fast train` left beside the checkpoint says which frames are taken and which layers are drawn, where the
    options do not.

    Raises:
        DataError: the clip is missing or cannot be read, or the question holds a special token of the model.
        OptionError: an empty question, a noun that is not in it, a video that is to be made of an image, a device that
            cannot be used.
        CheckpointError: the checkpoint cannot be loaded.
        ValueError: a model family without adapter, or a layer that it does not have.
    """
    media, question = Path(options.media), plain_question(options.question)
    nouns = [find_noun(question, noun, options.occurrence) for noun in options.show]
    if not media.exists():
        raise DataError("there is no such file or folder", source=str(media))
    kind = "image" if media.suffix.lower() in IMAGE_SUFFIXES and not media.is_dir() else "video"
    if options.video is not None:
        import_av()
        if kind == "image":
            raise OptionError(f"{media} is an image, of which no video can be made: leave --video out")
    run = trained_as(options.model)
    loss = (run and run.attention_loss) or AttentionLoss()
    if options.layers is not None:
        loss = loss.replace(layers=options.layers)

    processor = load_processor(options.model)
    builder = SampleBuilder(processor, *choose_sampling(options, run))
    with closing(builder.reader):
        prompt = encode_question(builder, media, kind, question, nouns)  # before the minutes that large weights take
        model = load_model(options.model, choose_inference(options, run))
        maps = compute_noun_maps(model, processor, prompt.encoding, loss) if nouns else None
        asked = Sample("", prompt.encoding.inputs)
        answer = generate(model, processor, [asked], options.max_new_tokens, stream=True)[0].strip()
        files, labels = [], [question[slice(*noun)] for noun in nouns]
        if maps is not None:
            files.append(draw_maps(options.out or "attention.png", prompt, maps, labels, question, answer))
        if options.video is not None:
            files.append(Path(options.video))
            centres = [float(np.mean(frames)) for frames in prompt.patches()]
            count = prompt.info.num_frames
            frames = ProgressBar(_all_frames(builder, prompt), "drawing", count, unit="frame", leave=False)
            write_heatmap_video(files[-1], frames, maps, centres, labels, prompt.info.fps)
    return Description(answer, maps, files)


def draw_maps(
    path: str | Path, prompt: Prompt, maps: np.ndarray, labels: Sequence[str], question: str, answer: str
) -> Path:
    """Draw the first frame of every temporal patch, and below it the map of each noun, into a PNG; return its path.

    Args:
        maps: [nouns, patches, h, w].
        labels: the nouns.
    """
    columns = []
    for index, frames in enumerate(prompt.patches()):
        label = ""
        if prompt.info.num_frames > 1:
            names = ", ".join(map(str, frames))
            label = f"frame{'s' * (len(frames) > 1)} {names} · {frames[0] / prompt.info.fps:.1f} s"
        first = prompt.pixels[index * prompt.temporal_patch_size]
        columns.append(HeatmapColumn(first, None, [of_noun[index] for of_noun in maps], label))
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


def _all_frames(builder: SampleBuilder, prompt: Prompt) -> Iterator[np.ndarray]:
    """Yield every frame of a clip in order, as far as the model sees it, decoded some at a time."""
    info = prompt.info
    step = max(1, CHUNK_BYTES // (3 * info.height * info.width))
    for first in range(0, info.num_frames, step):
        chosen = range(first, min(first + step, info.num_frames))
        yield from builder.encode.seen(prompt.record.kind, builder.reader.frames(prompt.record, chosen))
