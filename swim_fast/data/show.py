"""One record as training would see it, in the plain values that `swim_fast.viz.record` draws."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.sample.media import read_mask
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.errors import OptionError
from swim_fast.jobs import Show
from swim_fast.labels import IGNORED_LABEL
from swim_fast.options import Decoding, Excerpt, Sampling, Supervision
from swim_fast.viz.record import Frame, Patch, Piece, RecordView, draw_frames, write_record_page


def show_record(options: Show, processor: Any) -> Path:
    """Draw one record as training would see it, as an HTML page, or its frames alone as a PNG.

    Args:
        options: the record, and the file to write, whose folder is made.
        processor: processor of the model.

    Raises:
        DataError: a record that cannot be used, or that the file does not have.
        OptionError: a PNG of a record without frames.
    """
    out, index = Path(options.out), options.index
    records = RecordFile(options.file, options.media, options.part(Excerpt))
    builder = SampleBuilder(processor, *map(options.part, (Sampling, Decoding, Supervision)))
    if not 0 <= index < len(records):
        raise DataError(f"there is no record {index}: the file has {len(records)}, counted from 0", source=options.file)
    with contextlib.closing(builder.reader):
        view = view_record(records[index], builder)
    if out.suffix.lower() == ".html":
        return write_record_page(out, view)
    if not view.patches:
        raise OptionError(f"out is {options.out!r}, but the record has no frames to draw: let it end in .html")
    return draw_frames(out, view)


def view_record(record: Record, builder: SampleBuilder) -> RecordView:
    """Collect what there is to see of a record.

    Raises:
        DataError: it cannot be used.
    """
    sample, conversation = builder(record), builder.render(record)
    nouns = [conversation.text[start:end] for start, end in conversation.nouns]
    tokens = [*map(builder.encode.processor.tokenizer.decode, sample.inputs["input_ids"])]
    num_labels = int((sample.inputs["labels"] != IGNORED_LABEL).sum())
    patches, keys = defaultdict(list), {}  # of a noun's token
    for pair in sample.pairs:
        row = sample.rows[pair.row]
        token = sample.tags[pair.row], row.position
        patches[token].append(sample.patch(pair))
        span = f"{row.key_start} to {row.key_end - 1}"
        keys[token] = span if keys.setdefault(token, span) == span else "of each patch by itself"
    view = RecordView(
        title=f"{Path(record.source).name}, record {record.number}" + (f" ({record.name})" if record.name else ""),
        facts=[("tokens", f"{len(tokens):,}", f"{num_labels:,} of them trained on")],
        nouns=nouns,
        text=list(_cut_text(record, sample, builder)),
        tokens=list(_cut_tokens(tokens, sample, builder)),
        rows=[
            (tag, tokens[position], position, keys[tag, position], where) for (tag, position), where in patches.items()
        ],
        notes=list(sample.notes),
    )
    if record.media is not None:
        supervised = {(patch, tag) for (tag, _), where in patches.items() for patch in where}
        _add_media(view, record, sample, builder, supervised)
    return view


def _add_media(
    view: RecordView, record: Record, sample: Sample, builder: SampleBuilder, supervised: set[tuple[int, int]]
) -> None:
    """Add the frames in their temporal patches, of which (patch, tag) are supervised, and what is to say about them."""
    info, video = builder.reader.info(record), record.kind == "video"
    num_patches, height, width = sample.cells.shape
    view.grid = height, width
    size = f"{info.width} × {info.height} pixels"
    if video:
        spacing = f"in {num_patches} temporal patches"
        if builder.encode.layout.seconds is not None:
            spacing += f", {float(sample.inputs[builder.encode.layout.seconds][0]):.3g} s apart"
        size += f", {info.num_frames} frames at {info.fps:g} per second"
        view.facts.insert(0, ("frames taken", f"{len(sample.frames)}", spacing))
    view.facts.insert(0, (record.kind, record.media.name, size))
    per_patch = f"{height} × {width}" + " in each patch" * video
    view.facts.insert(-1, ("visual tokens", f"{int((sample.inputs['mm_token_type_ids'] != 0).sum()):,}", per_patch))
    view.facts.append(("attention rows", f"{len(sample.rows)}", f"tagged nouns: {len(view.nouns)}"))

    masks = defaultdict(dict)  # frame -> tag -> mask
    for tag, segmentations in enumerate(record.objects):
        if tag not in sample.tags:
            where = "the second frame of a patch" if builder.supervision.supervise == "second" else "these frames"
            view.notes.append(f"“{view.nouns[tag]}” has no mask in {where}: its attention is not trained")
        for frame in segmentations:
            if mask := read_mask(record, tag, frame, info):
                masks[frame][tag] = builder.encode.seen(record.kind, mask.decode())
    frames, last = [], None
    for frame, pixels in zip(sample.frames, builder.reader.frames(record, sample.frames), strict=True):
        label = f"frame {frame}, {frame / info.fps:.2f} s" + " (repeated)" * (frame == last) if video else ""
        frames.append(Frame(builder.encode.seen(record.kind, pixels), label, masks[frame]))
        last = frame
    step = len(frames) // num_patches
    for patch, cells in enumerate(sample.cells):
        tokens = cells[cells >= 0]
        view.patches.append(
            Patch(
                name=f"patch {patch}" if video else "image",
                tokens=f"{int(tokens.min())} to {int(tokens.max())}" if len(tokens) else "none",
                frames=frames[patch * step : (patch + 1) * step],
                nouns=sorted(tag for where, tag in supervised if where == patch),
            )
        )


def _cut_text(record: Record, sample: Sample, builder: SampleBuilder) -> Iterator[Piece]:
    """Cut the conversation, as the model reads it, where its role or noun changes."""
    conversation = builder.render(record)
    roles: list[str] = [""] * len(conversation.text)
    nouns: list[int | None] = [None] * len(conversation.text)
    special = [match.span() for match in builder.render.special_tokens.finditer(conversation.text)]
    media = [conversation.media] if conversation.media else []
    for role, spans in (("special", special), ("answer", conversation.labels), ("visual", media)):
        for start, end in spans:
            roles[start:end] = [role] * (end - start)
    for tag, (start, end) in enumerate(conversation.nouns):
        nouns[start:end] = [tag] * (end - start)
    letters = zip(conversation.text, roles, nouns, strict=True)
    for (role, noun), group in itertools.groupby(letters, lambda letter: letter[1:]):
        text = "".join(letter for letter, *_ in group)
        num_visual = int((sample.inputs["mm_token_type_ids"] != 0).sum())
        yield Piece(f"{num_visual:,} visual tokens" if role == "visual" else text, role, noun)


def _cut_tokens(tokens: list[str], sample: Sample, builder: SampleBuilder) -> Iterator[Piece]:
    """One piece for each token, and one for all visual ones."""
    tags = {position: tag for (position, *_), tag in zip(sample.rows, sample.tags, strict=True)}
    for visual, group in itertools.groupby(range(len(tokens)), lambda i: sample.inputs["mm_token_type_ids"][i] != 0):
        positions = list(group)
        if visual:
            yield Piece(f"{len(positions):,} visual tokens", "visual", None, f"{positions[0]} to {positions[-1]}")
            continue
        for i in positions:
            role = "special" if builder.render.special_tokens.fullmatch(tokens[i]) else ""
            role = "label" if sample.inputs["labels"][i] != IGNORED_LABEL else role
            yield Piece(tokens[i], role, tags.get(i), str(i))
