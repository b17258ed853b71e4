"""Counts of a tagged set: nouns, tags per record, sizes of masks, annotated frames."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swim_fast.data.sample.media import MediaReader
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import read_segmentation, stated_size
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.data.source.tags import strip_tags
from swim_fast.errors import OptionError, name_count, printable
from swim_fast.jobs import Stats as StatsOptions
from swim_fast.progress_bar import ProgressBar
from swim_fast.viz.charts import draw_counts

logger = logging.getLogger(__name__)

_PERCENTILES = (5, 25, 50, 75, 95)


@dataclass
class Stats:
    """Counts of a file.

    Attributes:
        path: file, as given.
        counts: records; video, image, text (by what they show); tagged (records with tags); tags; masks; empty_masks;
            problems.
        nouns: tagged nouns in lower case.
        tags_per_record: number of records by their number of tags, those without included.
        areas: share of the frame of each mask that is not empty.
        frames: number of frames with a mask that is not empty, of each tagged object.
        first_problem: problem of the first record or mask that could not be counted, "" if there is none.
    """

    path: str
    counts: Counter = field(default_factory=Counter)
    nouns: Counter = field(default_factory=Counter)
    tags_per_record: Counter = field(default_factory=Counter)
    areas: array = field(default_factory=lambda: array("d"))
    frames: array = field(default_factory=lambda: array("q"))
    first_problem: str = ""

    def note(self, error: DataError) -> None:
        """Count a problem."""
        self.counts["problems"] += 1
        self.first_problem = self.first_problem or str(error)

    def draw(self, path: str | Path, top: int = 20) -> None:
        """Draw the counts, with the `top` most frequent nouns, into a PNG.

        Raises:
            OptionError: there is nothing to draw.
        """
        if not self.counts["tags"]:
            raise OptionError(f"{self.path} has no tagged noun: there is nothing to draw")
        nouns = dict(self.nouns.most_common(top))
        draw_counts(path, Path(self.path).name, nouns, self.tags_per_record, self.areas, self.frames)

    def table(self, top: int = 20) -> str:
        """Return the counts for people, with the `top` most frequent nouns."""
        count = self.counts
        per_record = ", ".join(f"{tags}: {number:,}" for tags, number in sorted(self.tags_per_record.items()))
        names = "percentiles " + ", ".join(map(str, _PERCENTILES))
        lines = [
            self.path,
            f"  {name_count(count['records'], 'record')}: "
            f"{count['video']:,} video, {count['image']:,} image, {count['text']:,} text only",
            f"  {count['tagged']:,} with {name_count(count['tags'], 'tagged noun')}, {len(self.nouns):,} of them "
            "different",
            f"  records by number of tags: {per_record or '-'}",
            f"  {name_count(count['masks'], 'mask')}, {count['empty_masks']:,} of them empty",
        ]
        if len(self.areas):
            percents = [f"{100 * value:.2f} %" for value in np.percentile(np.array(self.areas), _PERCENTILES)]
            lines.append(f"  share of the frame, {names}: " + ", ".join(percents))
        if len(self.frames):
            values = [f"{value:g}" for value in np.percentile(np.array(self.frames), _PERCENTILES)]
            lines.append(f"  annotated frames of an object, {names}: " + ", ".join(values))
        if count["problems"]:
            problems = name_count(count["problems"], "problem")
            lines.append(f"  {problems}, see `swim-fast data check`; the first: {self.first_problem}")
        if self.nouns:
            lines.append("  most frequent nouns:")
            frequent = [(printable(noun), number) for noun, number in self.nouns.most_common(top)]
            width = max(len(noun) for noun, _ in frequent)
            lines += (
                f"    {noun:<{width}}  {number:>9,}  {100 * number / count['tags']:5.1f} %" for noun, number in frequent
            )
        return "\n".join(lines)


def collect(options: StatsOptions, progress: bool = True) -> Stats:
    """Read a file of tagged records and decode all its masks.

    A clip is opened only for masks that do not state the size of their frame, such as polygons.

    Raises:
        DataError: the file cannot be read at all; problems of records are counted.
    """
    records, stats = RecordFile(options.file, options.media), Stats(options.file)
    count = min(len(records), options.limit or len(records))
    clips = MediaReader(options)
    try:
        for index in ProgressBar(range(count), unit="record", disable=not progress):
            stats.counts["records"] += 1
            try:
                _count_record(records[index], stats, clips)
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
        if stated := stated_size(segmentation) or record.mask_size:
            return stated
        if not known:
            info = clips.info(record)
            known.append((info.height, info.width))
        return known[0]

    for i, frames in enumerate(record.objects):
        annotated = 0
        for frame, segmentation in frames.items():
            try:
                size = (0, 0) if segmentation is None else size_of(segmentation)
                mask = read_segmentation(segmentation, *size, record.mask_size)
            except DataError as error:
                key = error.key or f"annotation[{i}]['{frame}']"
                stats.note(error.within(source=record.source, record=record.number, name=record.name, key=key))
                continue
            stats.counts.update(masks=1, empty_masks=mask is None)
            if mask is not None:
                annotated += 1
                stats.areas.append(mask.area)
        stats.frames.append(annotated)
