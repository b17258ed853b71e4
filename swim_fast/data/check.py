"""Go through a whole data file before training on it: count what is there, and find every problem."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset

from swim_fast.data.sample.builder import MediaReader, SampleBuilder, SampleOptions, check_frame_number, decode_mask
from swim_fast.data.sample.conversation import Conversation
from swim_fast.data.sample.sampling import choose_frames, count_frames
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, RecordFile
from swim_fast.data.source.tags import strip_tags


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one record.

    Attributes:
        record: number of the record in the file.
        name: the record's own name, "" if it has none or could not be read.
        kind: "record", "conversations", "annotation", "video", "image".
        key: the place in the record, as exactly as it is known.
        reason: what is wrong, and the remedy.
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
    """What `check_file` found; ``as_dict`` serialises to JSON, ``str`` is for people.

    Attributes:
        path: the file, as given.
        counts: records; usable (without any problem); video, image, text (by what they show); with_tags (records);
            tags; annotated_frames (frames of a record in which any object has a mask); masks.
        tokens: fewest, mean and most tokens of a sample, and how many samples were thinned to fit; None if no processor
            was given or no video decoded.
        problems: all of them, in the order of the file.
    """

    path: str
    counts: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, float] | None = None
    problems: list[Problem] = field(default_factory=list)

    def by_kind(self) -> dict[str, int]:
        """Number of problems of each kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return {**asdict(self), "problems_by_kind": self.by_kind()}

    def __str__(self) -> str:
        count = self.counts
        lines = [
            self.path,
            f"  {count['records']:,} records, {count['usable']:,} usable: "
            f"{count['video']:,} video, {count['image']:,} image, {count['text']:,} text only",
            f"  {count['with_tags']:,} records with {count['tags']:,} tagged nouns, "
            f"{count['masks']:,} masks in {count['annotated_frames']:,} annotated frames",
        ]
        if self.tokens:
            lines.append("  tokens per sample: {fewest:,.0f} to {most:,.0f}, mean {mean:,.0f}".format(**self.tokens))
            if self.tokens["thinned"]:
                lines[-1] += f"; {self.tokens['thinned']:,.0f} with fewer or smaller frames to fit"
        if not self.problems:
            return "\n".join([*lines, "  no problems"])
        kinds = ", ".join(f"{count:,} in {kind}" for kind, count in self.by_kind().items())
        lines.append(f"  {len(self.problems):,} problems: {kinds}")
        return "\n".join([*lines, *(f"    {problem}" for problem in self.problems)])


@dataclass
class _Finding:
    """What is known about one record."""

    record: int
    name: str = ""
    counts: Counter = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    tokens: int | None = None
    thinned: bool = False

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
    path: str,
    options: SampleOptions | None = None,
    processor: Any = None,
    media: str | None = None,
    *,
    decode: bool = True,
    workers: int = 2,
    progress: bool = True,
) -> CheckReport:
    """Read every record of a file, decode its clip and all its masks for real, and report what is wrong.

    Args:
        path: JSON list or JSONL of records.
        options: how samples are made: the reader, its time limit, frames, pixels, tokens.
        processor: the model's; None leaves chat template and tokens unchecked.
        media: folder that relative media paths start from; None: the folder of ``path``.
        decode: False opens no clip: frame numbers, frame sizes and token counts are not checked, and of the masks only
            those that state their size.
        workers: processes; 0 works in this one.
        progress: show a progress bar on stderr.

    Raises:
        DataError: if the file cannot be read at all. What is wrong with a record is in the report.
        ValueError: for a processor or options that cannot be used.
    """
    from tqdm import tqdm

    records = _RecordChecks(path, options or SampleOptions(), processor, media, decode)
    loader = DataLoader(records, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    report, tokens, thinned = CheckReport(str(path)), [], 0
    counts = Counter(dict.fromkeys(_COUNTS, 0))
    try:
        for finding in tqdm(loader, total=len(records), desc="check", unit="record", disable=not progress):
            counts += finding.counts
            counts["usable"] += not finding.problems
            report.problems += finding.problems
            thinned += finding.thinned
            if finding.tokens is not None:
                tokens.append(finding.tokens)
    finally:
        records.close()
    counts["records"] = len(records)
    report.counts = {name: counts[name] for name in _COUNTS}
    if tokens:
        report.tokens = {
            "fewest": min(tokens),
            "mean": sum(tokens) / len(tokens),
            "most": max(tokens),
            "thinned": thinned,
        }
    return report


_COUNTS = ("records", "usable", "video", "image", "text", "with_tags", "tags", "annotated_frames", "masks")


def _as_it_is(item):
    return item


class _RecordChecks(Dataset):
    """Item i is the `_Finding` on record i; works in worker processes."""

    def __init__(self, path: str, options: SampleOptions, processor: Any, media: str | None, decode: bool):
        self.path, self.options, self.decode = str(path), options, decode
        self.file = RecordFile(path, media)
        self.builder = None if processor is None else SampleBuilder(processor, options)
        self.reader = self.builder.reader if self.builder else MediaReader(options.reader, options.decode_timeout)

    def __len__(self) -> int:
        return len(self.file)

    def close(self) -> None:
        self.reader.close()

    def __getitem__(self, number: int) -> _Finding:
        finding = _Finding(number)
        with finding.noting():
            record = self.file[number]
            finding.name = record.name
            finding.counts[record.kind] += 1
            finding.counts["tags"] += len(record.objects)
            finding.counts["with_tags"] += bool(record.objects)
            conversation = None
            with finding.noting():
                conversation = self._conversation(record)
            if not self.decode:
                self._check_unopened(record, conversation, finding)
            elif record.media is not None:
                self._check_media(record, finding)
            if self.builder is not None and self.decode and not finding.problems:
                sample = self.builder(record)
                finding.tokens, finding.thinned = len(sample.inputs["input_ids"]), bool(sample.notes)
        return finding

    def _conversation(self, record: Record) -> Conversation | None:
        if self.builder is not None:
            return self.builder.render(record)
        for number, turn in enumerate(record.turns):
            try:
                strip_tags(turn.text)
            except DataError as error:
                raise error.within(key=f"conversations[{number}]") from error
        return None

    def _check_media(self, record: Record, finding: _Finding) -> None:
        """Check frame numbers and every mask, and decode the frames that training would take."""
        info = self.reader.info(record)
        annotated = set()
        for number, segmentations in enumerate(record.objects):
            for frame in segmentations:
                with finding.noting():
                    check_frame_number(record, number, frame, info.num_frames)
                    if decode_mask(record, number, frame, info.height, info.width) is not None:
                        annotated.add(frame)
                        finding.counts["masks"] += 1
        finding.counts["annotated_frames"] += len(annotated)
        if self.builder is None or finding.problems:  # else the builder is about to decode them
            frames = [0]
            if record.kind == "video":
                options = self.options
                count = count_frames(info.num_frames, info.fps, len(annotated), options.max_frames, options.fps)
                frames = choose_frames(info.num_frames, sorted(annotated), count)
            self.reader.frames(record, frames)

    def _check_unopened(self, record: Record, conversation: Conversation | None, finding: _Finding) -> None:
        """Check what can be checked without the clip."""
        with finding.noting():
            if record.media is not None and not record.media.exists():
                raise DataError(f"{record.media} does not exist; correct the path or the media folder", key=record.kind)
        for number, segmentations in enumerate(record.objects):
            for frame, segmentation in segmentations.items():
                if size := _stated_size(segmentation):
                    with finding.noting():
                        decode_mask(record, number, frame, *size)
        if conversation is not None:
            encoding = self.builder.encode.text(conversation)
            for number in range(len(record.objects)):
                encoding.noun_tokens(number)


def _stated_size(segmentation: Any) -> tuple[int, int] | None:
    """Height and width that a run-length encoding names, if it does."""
    if isinstance(segmentation, dict) and "segmentation" in segmentation:
        segmentation = segmentation["segmentation"]
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else None
