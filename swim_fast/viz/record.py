"""One record as one picture: its frames under their masks, its text with the tagged nouns, and the rows they become."""

from __future__ import annotations

import functools
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from swim_fast.data.sample.builder import Sample, SampleBuilder, SampleOptions, decode_mask
from swim_fast.data.sample.conversation import Conversation
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.data.video.reader import MediaInfo

# Inches. The letters of DejaVu Sans Mono are 0.602 of their size wide: at 120 dots per inch a whole number of dots.
WIDTH, MARGIN, DPI = 15.0, 0.35, 120
FONT_SIZE, LINE = 10, 0.205
COLUMNS = int((WIDTH - 2 * MARGIN) * 72 / (0.602 * FONT_SIZE))
MOST_LINES = 60  # of text, and of rows

INK, FAINT, ANSWER = "#1a1a1a", "#808080", "#0d47a1"
# Distinct on photographs and under black letters (Okabe and Ito's palette for all kinds of colour vision, reordered).
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")

_Words = tuple[str, str, "str | None"]  # text, colour ("bold": black and bold), background


@dataclass
class _Shown:
    """What the drawing functions need of a record."""

    record: Record
    sample: Sample
    conversation: Conversation
    processor: Any
    special_tokens: re.Pattern[str]
    info: MediaInfo | None = None
    pixels: Sequence[np.ndarray] = ()  # one frame each, uint8 [H, W, 3]
    masks: Sequence[dict[int, np.ndarray]] = ()  # per frame: tag number → mask

    def colour(self, tag: int) -> str:
        return COLOURS[tag % len(COLOURS)]

    def noun(self, tag: int) -> str:
        start, end = self.conversation.nouns[tag]
        return self.conversation.text[start:end]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Temporal patches, and height and width of one in visual tokens."""
        part = "video" if self.record.kind == "video" else "image"
        time, height, width = self.sample.inputs[f"{part}_grid_thw"][0].tolist()
        merge_size = getattr(self.processor, f"{part}_processor").merge_size
        return time, height // merge_size, width // merge_size

    def supervised(self, patch: int) -> list[int]:
        """The tags that have a mask in a temporal patch."""
        _, height, width = self.grid
        rows = {row for row, start, *_ in self.sample.pairs if self.sample.patches[start // (height * width)] == patch}
        return sorted({self.sample.tags[row] for row in rows})


def show_record(
    path: str | PathLike[str],
    index: int,
    out_png: str | PathLike[str],
    processor: Any,
    options: SampleOptions | None = None,
    media: str | PathLike[str] | None = None,
) -> Path:
    """Draw one record as training would see it, into a PNG.

    Shown are the frames that are taken, with their numbers and times, each noun's masks in the noun's colour; which
    temporal patches are supervised, with the grid of their visual tokens; the text after the chat template, what is
    trained on in blue; and the attention rows: token, position, range of the softmax, patches.

    Args:
        path: JSON list or JSONL of records.
        index: number of the record, from 0.
        out_png: file to write; its folder is made.
        processor: the model's processor.
        options: as for training.
        media: folder that relative media paths start from; None: the folder of ``path``.

    Returns:
        The path of the PNG.

    Raises:
        DataError: for a record that cannot be used, or that the file does not have.
        ValueError: for a processor or options that cannot be used.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = RecordFile(path, media)
    if not 0 <= index < len(file):
        raise DataError(f"there is no record {index}: the file has {len(file)}, counted from 0", source=str(path))
    figure = _draw(_prepare(file[index], SampleBuilder(processor, options), processor))
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # a letter that no installed font has is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(out_png)
    return out_png


def _prepare(record: Record, builder: SampleBuilder, processor: Any) -> _Shown:
    try:
        sample = builder(record)
        shown = _Shown(record, sample, builder.render(record), processor, builder.render.special_tokens)
        if record.media is not None:
            shown.info = info = builder.reader.info(record)
            shown.pixels = builder.reader.frames(record, sample.frames)
            annotated = [
                [tag for tag, frames in enumerate(record.objects) if frame in frames] for frame in sample.frames
            ]
            decoded = [
                {tag: decode_mask(record, tag, frame, info.height, info.width) for tag in tags}
                for frame, tags in zip(sample.frames, annotated, strict=True)
            ]
            shown.masks = [{tag: mask for tag, mask in masks.items() if mask is not None} for masks in decoded]
        return shown
    finally:
        builder.reader.close()


def _draw(shown: _Shown):
    from matplotlib.figure import Figure

    head, text, rows = _headline(shown), _text_lines(shown), _row_lines(shown)
    per_line = max(2, min(8, 2 * round(len(shown.pixels) ** 0.5))) if shown.record.kind == "video" else 3
    cell = (WIDTH - 2 * MARGIN) / per_line
    picture = (cell - 0.1) * (shown.info.height / shown.info.width if shown.info else 0)
    picture = min(picture, 5.0)
    cell_height = picture + 0.62
    num_lines = -(-len(shown.pixels) // per_line)
    height = 2 * MARGIN + LINE * (len(head) + len(text) + len(rows) + 3) + num_lines * cell_height
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    top = _write(figure, height - MARGIN, head) - 0.15
    for number in range(len(shown.pixels)):
        line, column = divmod(number, per_line)
        left, bottom = MARGIN + column * cell, top - line * cell_height - picture - 0.22
        _draw_frame(figure, shown, number, (left, bottom, cell - 0.1, picture))
    top -= num_lines * cell_height + 0.1
    top = _write(figure, top, text) - LINE
    _write(figure, top, rows)
    return figure


def _headline(shown: _Shown) -> list[list[_Words]]:
    record, sample, info = shown.record, shown.sample, shown.info
    name = f" ({record.name})" if record.name else ""
    lines = [[(f"{Path(record.source).name}, record {record.number}{name}", "bold", None)]]
    length = len(sample.inputs["input_ids"])
    if info is None:
        lines.append([(f"text only · {length:,} tokens", FAINT, None)])
    else:
        patches, height, width = shown.grid
        what = f"{record.media.name} · {info.width} × {info.height} pixels"
        tokens = f"{height} × {width} visual tokens"
        if record.kind == "video":
            seconds = float(sample.inputs["second_per_grid_ts"][0])
            what += f" · {info.num_frames} frames at {info.fps:g} per second"
            tokens = f"{len(sample.frames)} frames in {patches} patches of {tokens}, {seconds:.3g} s apart"
        lines.append([(f"{what} → {tokens} · {length:,} tokens in all", FAINT, None)])
    lines += [[(note, COLOURS[5], None)] for note in sample.notes]
    key: list[_Words] = [("trained on: ", FAINT, None), ("answers", ANSWER, None)]
    if sample.rows:
        key += [(" and the attention of ", FAINT, None), ("nouns", INK, COLOURS[0])]
        key += [(" to their masks, compared on the grid of visual tokens (black bars)", FAINT, None)]
    return [*lines, key]


def _draw_frame(figure, shown: _Shown, number: int, place: tuple[float, float, float, float]) -> None:
    """A frame, its masks and its captions; place is (left, bottom, width, height) of the picture in inches."""
    from matplotlib.lines import Line2D

    left, bottom, width, height = place
    whole = figure.get_figheight()
    frame, info = shown.sample.frames[number], shown.info
    per_patch = shown.processor.video_processor.temporal_patch_size if shown.record.kind == "video" else 1
    patch, place_in_patch = divmod(number, per_patch)
    tags = shown.supervised(patch)

    axes = figure.add_axes((left / WIDTH, bottom / whole, width / WIDTH, height / whole))
    axes.imshow(_picture(shown, number), extent=(0, info.width, info.height, 0), interpolation="bilinear")
    axes.set_anchor("W")
    axes.axis("off")
    if tags:  # the cells that the attention is compared on
        _, rows, columns = shown.grid
        lines = {"color": "white", "linewidth": 0.5, "alpha": 0.5}
        axes.hlines([info.height * i / rows for i in range(1, rows)], 0, info.width, **lines)
        axes.vlines([info.width * i / columns for i in range(1, columns)], 0, info.height, **lines)

    caption = f"frame {frame}"
    if shown.record.kind == "video":
        caption += f" · {frame / info.fps:.2f} s"
    if number and shown.sample.frames[number - 1] == frame:
        caption += " (repeated)"
    _words(figure, left, bottom + height + 0.05, [(caption, INK, None)], size=8)

    y = bottom - 0.07
    last = place_in_patch == per_patch - 1
    colour = INK if tags else "#cccccc"
    figure.add_artist(
        Line2D([left / WIDTH, (left + width + 0.1 * (not last)) / WIDTH], [y / whole] * 2, color=colour, linewidth=3)
    )
    if place_in_patch == 0:
        _, rows, columns = shown.grid
        first = int(shown.sample.inputs["mm_token_type_ids"].argmax()) + patch * rows * columns
        words = [(f"patch {patch}, tokens {first} to {first + rows * columns - 1}", INK if tags else FAINT, None)]
        for tag in tags:
            words += [(" ", INK, None), (shown.noun(tag)[:20], INK, shown.colour(tag))]
        _words(figure, left, y - 0.17, words, size=8)


def _picture(shown: _Shown, number: int, most_pixels: int = 640) -> np.ndarray:
    """The frame with each mask as a veil and an outline in its colour, uint8 [h, w, 3]."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    frame = Image.fromarray(np.ascontiguousarray(shown.pixels[number]))
    scale = most_pixels / max(frame.size)
    size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    picture = np.asarray(frame.resize(size), np.float32)
    for tag, mask in shown.masks[number].items():
        inside = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) != 0
        colour = 255 * np.array(to_rgb(shown.colour(tag)), np.float32)
        picture[inside] = 0.5 * picture[inside] + 0.5 * colour
        inner, outer = _grown(~inside, 4), _grown(inside, 3)
        picture[inside & inner] = colour
        picture[outer & ~inside] = 0.2 * picture[outer & ~inside]  # sets the outline off against any background
    return picture.round().astype(np.uint8)


def _grown(region: np.ndarray, by: int) -> np.ndarray:
    """The region and all that is at most ``by`` pixels away from it, in either direction; bool [h, w]."""
    for axis in (0, 1):
        padded = np.pad(region, [(by, by) if a == axis else (0, 0) for a in (0, 1)])
        region = np.lib.stride_tricks.sliding_window_view(padded, 2 * by + 1, axis).any(-1)
    return region


def _text_lines(shown: _Shown) -> list[list[_Words]]:
    """The rendered conversation, broken into lines: nouns on their colour, what is trained on in blue."""
    conversation, text = shown.conversation, shown.conversation.text
    style: list[tuple[str, str | None]] = [(INK, None)] * len(text)
    for start, end in conversation.answers:
        style[start:end] = [(ANSWER, None)] * (end - start)
    for found in shown.special_tokens.finditer(text):
        colour = ANSWER if style[found.start()][0] == ANSWER else FAINT
        style[found.start() : found.end()] = [(colour, None)] * len(found.group())
    for tag, (start, end) in enumerate(conversation.nouns):
        style[start:end] = [(style[start][0], shown.colour(tag))] * (end - start)
    runs: list[_Words] = []
    for letter, (colour, background) in zip(text, style, strict=True):
        if runs and runs[-1][1:] == (colour, background):
            runs[-1] = (runs[-1][0] + letter, colour, background)
        else:
            runs.append((letter, colour, background))
    if conversation.media:
        pad = text[slice(*conversation.media)]
        count = int((shown.sample.inputs["mm_token_type_ids"] != 0).sum())
        runs = [(words.replace(pad, f"{pad} × {count:,} "), *style) for words, *style in runs]
    lines = list(_wrapped(runs))
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [[(f"… {len(lines) - MOST_LINES} more lines", FAINT, None)]]
    return lines


def _wrapped(runs: Sequence[_Words]) -> Iterator[list[_Words]]:
    """Break styled words into lines of at most COLUMNS columns, between words where possible."""
    line: list[_Words] = []
    column = 0
    for words, *style in runs:
        for piece in re.findall(r"\n|[^\S\n]+|\S+", words):
            width = _columns(piece)
            if piece == "\n" or (column and column + width > COLUMNS):
                yield line
                line, column = [], 0
                if piece.isspace():
                    continue
            while width > COLUMNS:
                yield [(piece[: COLUMNS // 2], *style)]
                piece = piece[COLUMNS // 2 :]
                width = _columns(piece)
            if line and line[-1][1:] == tuple(style):
                line[-1] = (line[-1][0] + piece, *style)
            else:
                line.append((piece, *style))
            column += width
    if line:
        yield line


def _row_lines(shown: _Shown) -> list[list[_Words]]:
    """One line per attention row."""
    sample = shown.sample
    if not sample.rows:
        return [[("no attention rows: no tagged noun has a mask in these frames", FAINT, None)]]
    lines = [[(f"{'row':>4}  {'noun':<22} {'position':>8}  {'token':<18} {'softmax over':<16} patches", FAINT, None)]]
    _, height, width = shown.grid
    for row, ((position, start, end, _), tag) in enumerate(zip(sample.rows, sample.tags, strict=True)):
        token = repr(shown.processor.tokenizer.decode(sample.inputs["input_ids"][position]))
        patches = [str(sample.patches[first // (height * width)]) for r, first, *_ in sample.pairs if r == row]
        noun = shown.noun(tag)
        noun = noun if _columns(noun) <= 22 else noun[:10] + "…"
        noun_gap = " " * (22 - _columns(noun))
        token_gap = " " * max(0, 18 - _columns(token))
        lines.append(
            [
                (f"{row:>4}  ", INK, None),
                (noun, INK, shown.colour(tag)),
                (
                    f"{noun_gap} {position:>8}  {token}{token_gap} {f'[{start}, {end})':<16} {' '.join(patches)}",
                    INK,
                    None,
                ),
            ]
        )
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [[(f"… {len(lines) - MOST_LINES} more rows", FAINT, None)]]
    return lines


def _write(figure, top: float, lines: Sequence[Sequence[_Words]]) -> float:
    """Write lines downwards from ``top`` inches; return where the next one would be."""
    for line in lines:
        top -= LINE
        _words(figure, MARGIN, top, line)
    return top


def _words(figure, left: float, bottom: float, words: Sequence[_Words], size: float = FONT_SIZE) -> None:
    """Write words one after the other, from a point in inches; the font is of one width."""
    for text, colour, background in words:
        box = {"facecolor": background, "edgecolor": "none", "pad": 1.5, "alpha": 0.75} if background else None
        figure.text(
            left / WIDTH,
            bottom / figure.get_figheight(),
            text,
            color=INK if colour == "bold" else colour,
            weight="bold" if colour == "bold" else "normal",
            family=_fonts(),
            size=size,
            bbox=box,
            parse_math=False,
        )
        left += _columns(text) * 0.602 * size / 72


def _columns(text: str) -> int:
    """Width of a text in columns: two for wide letters, none for combining ones."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) != 0 for letter in text)


@functools.cache
def _fonts() -> list[str]:
    """DejaVu Sans Mono, which matplotlib brings along, then what is installed for the letters that it lacks."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    more = ("Noto Sans Mono CJK SC", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "Noto Emoji", "Symbola", "DejaVu Sans")
    return ["DejaVu Sans Mono", *(name for name in more if name in installed)]
