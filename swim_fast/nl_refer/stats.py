"""What a tagged set holds: nouns, tags per record, how large the masks are, how many frames are annotated."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swim_fast.data.sample.builder import MediaReader
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import decode_segmentation
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.data.source.tags import strip_tags

logger = logging.getLogger(__name__)

_PERCENTILES = (5, 25, 50, 75, 95)


@dataclass
class Stats:
    """Counts of a file.

    Attributes:
        path: the file, as given.
        counts: records; video, image, text (by what they show); tagged (records with tags); tags; masks; empty_masks;
            problems.
        nouns: tagged nouns in lower case.
        tags_per_record: number of records by their number of tags, those without included.
        areas: of each mask that is not empty, its share of the frame.
        frames: of each tagged object, the number of its frames that have a mask that is not empty.
        first_problem: what the first record or mask that could not be counted suffers from, "" if there is none.
    """

    path: str
    counts: Counter = field(default_factory=Counter)
    nouns: Counter = field(default_factory=Counter)
    tags_per_record: Counter = field(default_factory=Counter)
    areas: array = field(default_factory=lambda: array("d"))
    frames: array = field(default_factory=lambda: array("q"))
    first_problem: str = ""

    def note(self, error: DataError) -> None:
        """Count something that could not be counted."""
        self.counts["problems"] += 1
        self.first_problem = self.first_problem or str(error)

    def table(self, top: int = 20) -> str:
        """The counts for people, with the ``top`` most frequent nouns."""
        count = self.counts
        per_record = ", ".join(f"{tags}: {number:,}" for tags, number in sorted(self.tags_per_record.items()))
        lines = [
            self.path,
            f"  {count['records']:,} records: "
            f"{count['video']:,} video, {count['image']:,} image, {count['text']:,} text only",
            f"  {count['tagged']:,} with {count['tags']:,} tagged nouns, {len(self.nouns):,} different ones",
            f"  records by number of tags: {per_record or '-'}",
            f"  {count['masks']:,} masks, {count['empty_masks']:,} of them empty",
        ]
        if len(self.areas):
            percents = [f"{100 * value:.2f} %" for value in np.percentile(np.array(self.areas), _PERCENTILES)]
            lines.append(f"  share of the frame, {_names()}: " + ", ".join(percents))
        if len(self.frames):
            values = [f"{value:g}" for value in np.percentile(np.array(self.frames), _PERCENTILES)]
            lines.append(f"  annotated frames of an object, {_names()}: " + ", ".join(values))
        if count["problems"]:
            lines.append(
                f"  {count['problems']:,} problems, see `swim-fast data check`; the first: {self.first_problem}"
            )
        if self.nouns:
            lines.append("  most frequent nouns:")
            width = max(len(noun) for noun, _ in self.nouns.most_common(top))
            lines += (
                f"    {noun:<{width}}  {number:>9,}  {100 * number / count['tags']:5.1f} %"
                for noun, number in self.nouns.most_common(top)
            )
        return "\n".join(lines)


def _names() -> str:
    return "percentiles " + ", ".join(map(str, _PERCENTILES))


def collect(
    path: str | Path,
    *,
    media: str | Path | None = None,
    reader: str = "decord",
    limit: int | None = None,
    progress: bool = True,
) -> Stats:
    """Read a file of tagged records and decode all its masks.

    A clip is opened only for masks that do not state the size of their frame, such as polygons.

    Args:
        path: NL-Refer file.
        media: folder that relative media paths start from; None: the folder of ``path``.
        reader: library that opens clips.
        limit: only so many records, from the first.
        progress: show a progress bar.

    Raises:
        DataError: the file cannot be read at all; problems of records are counted.
        ValueError: ``limit`` is not positive.
    """
    from tqdm import tqdm

    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; it must be at least 1")
    records, stats, clips = RecordFile(path, media), Stats(str(path)), MediaReader(reader, 60.0)
    try:
        for number in tqdm(range(min(len(records), limit or len(records))), unit="record", disable=not progress):
            stats.counts["records"] += 1
            try:
                _count_record(records[number], stats, clips)
            except DataError as error:
                stats.note(error)
    finally:
        clips.close()
    return stats


def _count_record(record: Record, stats: Stats, clips: MediaReader) -> None:
    nouns = []
    for turn in record.turns:
        text, spans = strip_tags(turn.text)
        nouns += [text[start:end].lower() for start, end in spans]
    stats.counts.update({record.kind: 1, "tagged": bool(nouns), "tags": len(nouns)})
    stats.nouns.update(nouns)
    stats.tags_per_record[len(nouns)] += 1
    known: list[tuple[int, int]] = []  # the clip's size, once it had to be opened

    def size_of(segmentation: Any) -> tuple[int, int]:
        if stated := _stated_size(segmentation):
            return stated
        if not known:
            info = clips.info(record)
            known.append((info.height, info.width))
        return known[0]

    for i, frames in enumerate(record.objects):
        annotated = 0
        for frame, segmentation in frames.items():
            try:
                mask = None if segmentation is None else decode_segmentation(segmentation, *size_of(segmentation))
            except DataError as error:
                key = error.key or f"annotation[{i}]['{frame}']"
                stats.note(error.within(source=record.source, record=record.number, name=record.name, key=key))
                continue
            stats.counts.update(masks=1, empty_masks=mask is None)
            if mask is not None:
                annotated += 1
                stats.areas.append(float(mask.mean()))
        stats.frames.append(annotated)


def _stated_size(segmentation: Any) -> tuple[int, int] | None:
    while isinstance(segmentation, dict) and "segmentation" in segmentation:
        segmentation = segmentation["segmentation"]
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    valid = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    return tuple(size) if valid else None


def draw(stats: Stats, path: str | Path, top: int = 20) -> None:
    """Draw the nouns, the tags per record, the mask areas and the annotated frames as one PNG.

    Args:
        stats: of a file with at least one tag.
        path: the picture; its folder is made if absent.
        top: how many nouns.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.figure import Figure

    if not stats.counts["tags"]:
        raise ValueError(f"{stats.path} has no tagged noun: there is nothing to draw")
    nouns = stats.nouns.most_common(top)
    figure = Figure(figsize=(11, 3 + max(4.0, 0.22 * len(nouns))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    axes = left.subplots()
    axes.barh([noun for noun, _ in nouns][::-1], [number for _, number in nouns][::-1], color="#3b6ea5")
    axes.set(title="tagged nouns", xlabel="tags")
    per_record, areas, frames = right.subplots(3)
    per_record.bar(list(stats.tags_per_record), list(stats.tags_per_record.values()), color="#3b6ea5")
    per_record.set(title="tags of a record", xlabel="tags", ylabel="records")
    per_record.xaxis.get_major_locator().set_params(integer=True)
    if len(stats.areas):
        values = np.array(stats.areas)
        bins = np.geomspace(values.min() * 0.99, 1.0, 40)
        areas.hist(values, bins=bins, color="#c0603b")
        areas.set(xscale="log")
    areas.set(title="masks", xlabel="share of the frame", ylabel="masks")
    counted = Counter(stats.frames)
    frames.bar(list(counted), list(counted.values()), color="#5a9367")
    frames.set(title="annotated frames", xlabel="frames of an object with a mask", ylabel="objects")
    frames.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(Path(stats.path).name)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
