"""Held-out clips as several checkpoints see them: frames, masks, answers, and the maps of every word."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from swim_fast.config import RunConfig
from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.data.sample.builder import Plan, Sample, SampleBuilder
from swim_fast.data.sample.conversation import PLACEHOLDER, Span
from swim_fast.data.sample.encoding import Encoding
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record
from swim_fast.data.source.tags import strip_tags
from swim_fast.errors import UserError
from swim_fast.inference.generation import generate
from swim_fast.inference.loading import choose_inference, load_model, load_processor
from swim_fast.inference.noun_maps import compute_layer_maps
from swim_fast.options import AttentionLoss, Inference
from swim_fast.viz.run_report import ClipView, RunView, Word

MAX_WORDS, MAX_FRAMES = 40, 16  # of a clip, for the size of the page


def build_gallery(
    folders: Sequence[Path],
    views: Sequence[RunView],
    configs: Sequence[RunConfig],
    clips: int,
    max_new_tokens: int,
    inference: Inference,
    notes: list[str],
) -> list[ClipView]:
    """Return clips of the first run's evaluation sets, evenly spaced, with the answer and maps of every run.

    What keeps a clip or a run from being shown is appended to `notes` or to the notes of the run.
    """
    config, gallery = configs[0], []
    if not config.data.eval:
        notes.append("The first run has no data.eval, so there are no held-out clips to show: name a file there.")
        return gallery
    for folder, view, own in zip(folders, views, configs, strict=True):
        if not (folder / "config.json").is_file():
            view.notes.append("There is no checkpoint in the folder: its answers and maps are not shown.")
            continue
        try:
            processor = load_processor(folder)
            builder = SampleBuilder(processor, config.sampling, config.decoding, config.supervision)
            model = load_model(folder, choose_inference(inference, own))
        except UserError as error:
            view.notes.append(f"Its answers and maps are not shown: {error}")
            continue
        with contextlib.closing(builder.reader):
            for clip, record, of_source in _choose_clips(config, builder, clips, gallery, notes):
                try:
                    _add_run(clip, view.label, record, of_source, model, own.attention_loss, max_new_tokens)
                except UserError as error:
                    notes.append(f"{clip.title} is not shown for {view.label}: {error}")
        del model
    return [clip for clip in gallery if clip.maps]


def _choose_clips(config: RunConfig, builder: SampleBuilder, count: int, gallery: list[ClipView], notes: list[str]):
    """Yield each clip, its record and the builder of its source; the first run fills the gallery."""
    sources = []
    for name, source in config.data.eval.items():
        try:
            sources.append((name, SwimDataset([source], builder)))
        except (UserError, OSError) as error:
            note = f"The set {name} cannot be read: {error}"
            if note not in notes:
                notes.append(note)
    places = [(name, data, index) for name, data in sources for index in range(len(data))]
    chosen = sorted({round(at) for at in np.linspace(0, len(places) - 1, min(count, len(places)))}) if places else []
    for name, data, index in (places[at] for at in chosen):
        title = f"{name}, record {index}"
        try:
            record, of_source = data.files[0][index], data.builders[0]
            clip = next((clip for clip in gallery if clip.title == title), None)
            if clip is None:
                if record.media is None:
                    raise DataError("it has no video or image")
                clip = _view_clip(title, record, of_source)
                gallery.append(clip)
            yield clip, record, of_source
        except UserError as error:
            note = f"{title} is not shown: {error}"
            if note not in notes:
                notes.append(note)


def _view_clip(title: str, record: Record, builder: SampleBuilder) -> ClipView:
    """Decode the frames that the model sees, and their masks; of many, one of each patch, annotated if there is one."""
    plan, seen = builder.plan(record), partial(builder.encode.seen, record.kind)
    size = builder.encode.frames_per_patch(record.kind)
    patch_of = {frame: slot // size for slot, frame in reversed(list(enumerate(plan.frames)))}
    if len(patch_of) > MAX_FRAMES:
        annotated = set().union(*plan.masks)
        # the last entry of a patch stays: one of its annotated frames, else its first
        first = dict(reversed([(patch, frame) for frame, patch in sorted(patch_of.items())]))
        first |= {patch: frame for frame, patch in patch_of.items() if frame in annotated}
        chosen = np.linspace(0, len(first) - 1, min(MAX_FRAMES, len(first))).round().astype(int)
        patch_of = {first[patch]: patch for patch in (sorted(first)[at] for at in chosen)}
    frames = sorted(patch_of)
    question, answer, words = _words(record, builder, plan)
    return ClipView(
        title=title,
        name=record.name,
        frames=list(seen(builder.reader.frames(record, frames))),
        labels=[f"frame {frame}" + (f" · {frame / plan.info.fps:.1f} s" if plan.info.fps else "") for frame in frames],
        patches=[patch_of[frame] for frame in frames],
        masks=[[seen(of_tag[at].decode()) if at in of_tag else None for at in frames] for of_tag in plan.masks],
        words=words,
        question=question,
        answer=answer,
    )


def _words(record: Record, builder: SampleBuilder, plan: Plan) -> tuple[Span, Span, list[Word]]:
    """Return the spans of the first question and its answer in the rendered text, and all words, spaces included."""
    conversation = plan.conversation
    text, answers = conversation.text, conversation.answers
    if not answers:
        raise DataError("it has no answer", key="conversations")
    asked = [turn.text for turn in record.turns if turn.role == "user"][0]
    plain = PLACEHOLDER.sub("", strip_tags(asked)[0]).strip()
    start = text.rfind(plain, 0, answers[0][0])
    if not plain or start < 0:
        raise DataError("its first question is not found in what the model reads", key="conversations")
    question, (first, last) = (start, start + len(plain)), answers[0]
    special = builder.render.special_tokens.search(text, first, last)
    answer = (first, special.start() if special else last)
    words = []
    for begin, end in (question, answer):
        for match in re.finditer(r"\w+(?:['’-]\w+)*|\W+?(?=\w|$)|\W+", text[begin:end]):
            span = begin + match.start(), begin + match.end()
            tags = [tag for tag, noun in enumerate(conversation.nouns) if noun[0] < span[1] and span[0] < noun[1]]
            words.append(Word(match[0], span, begin == answer[0], tags[0] if tags else None))
    return question, answer, words


def _add_run(
    clip: ClipView,
    label: str,
    record: Record,
    builder: SampleBuilder,
    model,
    loss: AttentionLoss | None,
    max_new_tokens: int,
) -> None:
    """Add a run's greedy answer to a clip and its maps, [words, frames, h, w] by layer."""
    plan, processor = builder.plan(record), builder.encode.processor
    pixels = builder.reader.frames(record, plan.frames)
    rendered = plan.conversation.text

    def encode(end: int, nouns: Sequence[Span]) -> Encoding:
        text = dataclasses.replace(plan.conversation, text=rendered[:end], nouns=tuple(nouns), answers=(), labels=())
        if record.kind == "image":
            return builder.encode.image(text, pixels[0])
        return builder.encode.video(text, pixels, plan.frames, plan.info, plan.max_pixels)

    prompt = Sample("", encode(plan.conversation.answers[0][0], ()).inputs)
    answer = generate(model, processor, [prompt], max_new_tokens)[0].strip()
    spoken = [word for word in clip.words if any(map(str.isalnum, word.text))][:MAX_WORDS]
    encoding = encode(clip.answer[1], [word.span for word in spoken])
    for index in range(len(spoken)):
        encoding.noun_tokens(index)  # a word without a token is refused before the model runs
    found = compute_layer_maps(model, processor, encoding, loss or AttentionLoss())
    num_patches = next(iter(found.values())).shape[1]
    if max(clip.patches) >= num_patches:
        raise DataError(f"the run makes {num_patches} temporal patches of it, fewer than the first run")
    clip.maps[label] = {name: maps[:, clip.patches] for name, maps in found.items()}
    clip.answers[label] = answer
    for index, word in enumerate(spoken):
        word.index = index
