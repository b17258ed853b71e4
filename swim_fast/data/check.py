"""Check of a whole data file before training on it: every record, clip and mask, and every problem."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.sample.conversation import Conversation
from swim_fast.data.sample.encoding import find_noun
from swim_fast.data.sample.media import MediaReader, read_mask, read_masks
from swim_fast.data.sample.sampling import choose_frames, count_frames
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import stated_size
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.data.source.tags import TokenRanges, strip_tags
from swim_fast.data.video.reader import MediaInfo
from swim_fast.errors import name_count, printable
from swim_fast.jobs import Check
from swim_fast.options import Decoding, Excerpt, Sampling, Supervision


@dataclass(frozen=True)
class Problem:
    """One problem of one record.

    Attributes:
        record: index of the record in the file.
        name: the record's own name, "" if it has none or could not be read.
        kind: "record", "conversations", "annotation", "video", "image".
        key: key in the record, as exactly as it is known.
        reason: problem and remedy.
    """

    record: int
    name: str
    kind: str
    key: str
    reason: str

    def __str__(self) -> str:
        where = f"record {self.record}" + (f" ({self.name})" if self.name else "") + (f", {self.key}" * bool(self.key))
        return f"{where}: {self.reason}"


@dataclass
class CheckReport:
    """Findings of `check_file`; `as_dict` serialises to JSON, `str` is for people.

    Attributes:
        path: the file, as given.
        counts: records; usable (without any problem); video, image, text (by what they show); with_tags (records);
            tags; tags_without_mask (none of whose masks has a pixel; None where that is not known, see `check_file`);
            annotated_frames (frames of a record in which any object has a mask); masks.
        tokens: fewest, mean and most tokens of a sample, and the number of samples thinned to fit; None without a
            processor or decoded video.
        problems: all problems, in the order of the file.
        warnings: what is no problem to training but may be to its masks: clips in which decord's own `get_batch`, by
            which masks may have been numbered, gives other frames than those displayed; each clip once.
        clips_in_part: number of clips of which there was time to compare only a part, see `FrameReader.compare`.
    """

    path: str
    counts: dict[str, int | None] = field(default_factory=dict)
    tokens: dict[str, float] | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    clips_in_part: int = 0

    def by_kind(self) -> dict[str, int]:
        """Return the number of problems of each kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, strings and numbers."""
        return {**asdict(self), "problems_by_kind": self.by_kind()}

    def __str__(self) -> str:
        count = self.counts
        lines = [
            self.path,
            f"  {name_count(count['records'], 'record')}, {count['usable']:,} usable: "
            f"{count['video']:,} video, {count['image']:,} image, {count['text']:,} text only",
            f"  {name_count(count['with_tags'], 'record')} with {name_count(count['tags'], 'tagged noun')}, "
            f"{name_count(count['masks'], 'mask')} in {name_count(count['annotated_frames'], 'annotated frame')}",
        ]
        if count["tags_without_mask"]:
            nouns = name_count(count["tags_without_mask"], "tagged noun")
            lines.append(f"  {nouns} without any mask pixel, whose attention is not trained")
        if self.tokens:
            lines.append("  tokens per sample: {fewest:,.0f} to {most:,.0f}, mean {mean:,.0f}".format(**self.tokens))
            if self.tokens["thinned"]:
                lines[-1] += f"; {self.tokens['thinned']:,.0f} with fewer or smaller frames to fit"
        if self.clips_in_part:
            clips = name_count(self.clips_in_part, "clip")
            lines.append(
                f"  too long to be compared with its index to the end: {clips}; a third of decode_timeout is for that"
            )
        if self.warnings:
            lines.append(f"  {name_count(len(self.warnings), 'warning')}:")
            lines += [f"    {warning}" for warning in self.warnings]
        if not self.problems:
            return "\n".join([*lines, "  no problems"])
        kinds = ", ".join(f"{count:,} in {kind}" for kind, count in self.by_kind().items())
        lines.append(f"  {name_count(len(self.problems), 'problem')}: {kinds}")
        return "\n".join([*lines, *(f"    {problem}" for problem in self.problems)])


@dataclass
class _Finding:
    """Counts, tokens and problems of one record."""

    record: int
    name: str = ""
    counts: Counter = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    tokens: int | None = None
    thinned: bool = False
    warnings: dict[str, Problem] = field(default_factory=dict)  # by clip
    in_part: str = ""  # path of a clip that was compared in part

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Turn a DataError into a problem and go on behind the block."""
        try:
            yield
        except DataError as error:
            kind = re.match("[a-z]*", error.key or "").group()
            kind = {"tag": "conversations", "": "record"}.get(kind, kind)
            self.problems.append(Problem(self.record, error.name or self.name, kind, error.key or "", error.reason))


def check_file(
    options: Check,
    processor: Any = None,
    progress: bool = True,
) -> CheckReport:
    """Read every record of a file, decode its clip and all its masks for real, and report every problem.

    Args:
        options: the file, and how samples are made of it. With `decode` off no clip is opened: frame indices, frame
            sizes and token counts are not checked, and of the masks only those that state their size.
        processor: processor of `options.model`; None leaves chat template and tokens unchecked.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the file cannot be read at all. Problems of a record are in the report.
        ProcessorError: a processor that cannot be used.
    """
    from swim_fast.progress_bar import ProgressBar

    records = _RecordChecks(options, processor)
    loader = DataLoader(records, batch_size=None, num_workers=options.workers, collate_fn=_as_it_is)
    report, tokens, thinned = CheckReport(options.file), [], 0
    counts = Counter(dict.fromkeys(_COUNTS, 0))
    warnings, in_part = {}, set()
    try:
        for finding in ProgressBar(loader, total=len(records), desc="check", unit="record", disable=not progress):
            counts += finding.counts
            counts["usable"] += not finding.problems
            report.problems += finding.problems
            thinned += finding.thinned
            warnings = {**finding.warnings, **warnings}  # each process that reads may warn of a clip
            in_part.add(finding.in_part)
            if finding.tokens is not None:
                tokens.append(finding.tokens)
    finally:
        records.close()
    report.warnings, report.clips_in_part = list(warnings.values()), len(in_part - {""})
    counts["records"] = len(records)
    report.counts = {name: counts[name] for name in _COUNTS}
    if not options.decode:
        report.counts["tags_without_mask"] = None
    if tokens:
        report.tokens = {
            "fewest": min(tokens),
            "mean": sum(tokens) / len(tokens),
            "most": max(tokens),
            "thinned": thinned,
        }
    return report


_COUNTS = (
    "records",
    "usable",
    "video",
    "image",
    "text",
    "with_tags",
    "tags",
    "tags_without_mask",
    "annotated_frames",
    "masks",
)


def _as_it_is(item):
    return item


class _RecordChecks(Dataset):
    """Findings on the records of a file; works in worker processes."""

    def __init__(self, options: Check, processor: Any):
        self.options = options
        self.file = RecordFile(options.file, options.media, options.part(Excerpt))
        self.builder = None
        if processor is not None:
            self.builder = SampleBuilder(processor, *map(options.part, (Sampling, Decoding, Supervision)))
        self.reader = self.builder.reader if self.builder else MediaReader(options)
        self.compared: dict[Path, DataError | bool] = {}  # clip -> the difference, or if all of it was compared
        self.warned: set[Path] = set()

    def __len__(self) -> int:
        return min(len(self.file), self.options.limit or len(self.file))

    def close(self) -> None:
        self.reader.close()

    def __getitem__(self, index: int) -> _Finding:
        finding = _Finding(index)
        with finding.noting():
            record = self.file[index]
            finding.name = record.name
            finding.counts[record.kind] += 1
            finding.counts["tags"] += len(record.objects)
            finding.counts["with_tags"] += bool(record.objects)
            conversation = None
            with finding.noting():
                conversation = self._conversation(record)
            if not self.options.decode:
                self._check_unopened(record, conversation, finding)
            elif record.media is not None:
                self._check_media(record, finding)
            if self.builder is not None and self.options.decode and not finding.problems:
                sample = self.builder(record)  # as training makes it: nothing that it refuses passes here
                finding.tokens, finding.thinned = len(sample.inputs["input_ids"]), bool(sample.notes)
        return finding

    def _conversation(self, record: Record) -> Conversation | None:
        if self.builder is not None:
            return self.builder.render(record)
        for index, turn in enumerate(record.turns):
            try:
                strip_tags(turn.text)
            except DataError as error:
                raise error.within(key=f"conversations[{index}]") from error
        return None

    def _check_media(self, record: Record, finding: _Finding) -> None:
        """Check frame indices and every mask, and decode the frames that training would take."""
        info = self.reader.info(record)
        before = len(finding.problems)
        if record.kind == "video":
            with finding.noting():
                self._compare(record, finding)
        differs = len(finding.problems) > before
        masks = read_masks(record, info, finding.noting)
        annotated = set().union(*masks)
        finding.counts["masks"] += sum(map(len, masks))
        finding.counts["annotated_frames"] += len(annotated)
        if not finding.problems:
            finding.counts["tags_without_mask"] += sum(not found for found in masks)
            self._compare_stock(record, sorted(annotated), info, finding)
        if not differs and (self.builder is None or finding.problems):  # else the builder is about to decode them
            frames = [0]
            if record.kind == "video":
                count = count_frames(info, len(annotated), self.options)
                frames = choose_frames(info.num_frames, sorted(annotated), count)
            self.reader.frames(record, frames)

    def _compare(self, record: Record, finding: _Finding) -> None:
        """Compare the index of a clip with its frames, once; a difference is a problem of each of its records."""
        if record.media not in self.compared:
            try:
                self.compared[record.media] = self.reader.compare(record)
            except DataError as error:
                self.compared[record.media] = error
        found = self.compared[record.media]
        if isinstance(found, DataError):
            raise DataError(found.reason, key=record.kind)
        if not found:
            finding.in_part = str(record.media)

    def _compare_stock(self, record: Record, annotated: list[int], info: MediaInfo, finding: _Finding) -> None:
        """Warn of a clip in which masks that were numbered by decord's own `get_batch` may be off, once."""
        numbered = annotated and record.kind == "video" and not record.media.is_dir()
        if not numbered or self.reader.name != "decord" or record.media in self.warned:
            return
        every = max(1, len(annotated) // 8)
        spread = {part * (info.num_frames - 1) // 8 for part in range(9)}
        if differ := self.reader.stock_differences(record, sorted(spread | set(annotated[::every]))):
            self.warned.add(record.media)
            frames = ", ".join(map(str, differ[:5])) + " …" * (len(differ) > 5)
            reason = (
                f"decord's own get_batch gives other frames of {printable(str(record.media))} than those displayed, as "
                f"at {frames}: masks that were numbered by it may be off; look at them with `swim-fast data show`"
            )
            finding.warnings[str(record.media)] = Problem(finding.record, finding.name, "video", "video", reason)

    def _check_unopened(self, record: Record, conversation: Conversation | None, finding: _Finding) -> None:
        """Check what can be checked without the clip."""
        with finding.noting():
            if record.media is not None and not record.media.exists():
                raise DataError(f"{record.media} does not exist; correct the path or the media folder", key=record.kind)
        for tag, segmentations in enumerate(record.objects):
            for frame, segmentation in segmentations.items():
                if size := stated_size(segmentation) or record.mask_size:
                    with finding.noting():
                        read_mask(record, tag, frame, MediaInfo(frame + 1, 1.0, *size))
        if conversation is not None:
            ranges = TokenRanges(self.builder.encode.text_offsets(conversation))
            for tag, noun in enumerate(conversation.nouns):
                find_noun(ranges, noun, tag)
