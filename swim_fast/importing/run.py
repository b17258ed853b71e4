"""The run over a data set: every clip or record of it, what became of it, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from swim_fast.data.source.errors import DataError
from swim_fast.errors import name_count
from swim_fast.importing.clips import Clips
from swim_fast.importing.formats.coco import CocoFile, YoutubeVisFile
from swim_fast.importing.formats.codes import Sam2Files, SavFiles
from swim_fast.importing.formats.conversations import Conversations
from swim_fast.importing.formats.cvat import CvatFile
from swim_fast.importing.formats.expressions import Expressions
from swim_fast.importing.formats.folders import ObjectFolders, PaletteFolders
from swim_fast.importing.formats.labelme import LabelmeFiles, LabelmeVideo
from swim_fast.importing.formats.placeholders import Placeholders
from swim_fast.importing.job import Job
from swim_fast.importing.sources import Names, read_lines
from swim_fast.jobs import Import
from swim_fast.nl_refer.output import check_distinct, record_writer
from swim_fast.options import Decoding
from swim_fast.progress_bar import ProgressBar

SHOWN = 20  # problems in the report; all are in the file beside the records


class Format(Protocol):
    """A data set that is read unit by unit: a clip, an image or a record of it."""

    units: Sequence[Any]

    def records(self, unit: Any) -> Iterator[dict]:
        """Yield the records of a unit; DataError for one that cannot be used at all."""


FORMATS: dict[str, Callable[[Job], Format]] = {
    "davis": PaletteFolders,
    "youtube-vos": PaletteFolders,
    "masks": ObjectFolders,
    "sa-v": SavFiles,
    "sam2": Sam2Files,
    "ref-youtube-vos": Expressions,
    "mevis": Expressions,
    "revos": Expressions,
    "coco": CocoFile,
    "youtube-vis": YoutubeVisFile,
    "labelme": LabelmeFiles,
    "labelme-video": LabelmeVideo,
    "cvat": CvatFile,
    "videorefer": Placeholders,
    "pixelrefer": Placeholders,
    "ms-swift": Conversations,
    "llama-factory": Conversations,
}


@dataclass
class ImportReport:
    """Outcome of a run; `str` is for people.

    Attributes:
        source, out: what was read and written.
        counts: units; records; tags; masks; problems.
        problems: the first ones.
        listed: file of all problems; None if there was none.
    """

    source: str
    out: str
    counts: Counter = field(default_factory=Counter)
    problems: list[DataError] = field(default_factory=list)
    listed: Path | None = None

    def __str__(self) -> str:
        count = self.counts
        lines = [
            f"{count['units']:,} clips, images or records of {self.source}",
            f"  {name_count(count['records'], 'record')} with {name_count(count['tags'], 'tagged noun')} and "
            f"{name_count(count['masks'], 'mask')}",
            f"  output: {self.out}",
        ]
        if self.problems:
            lines.append(f"  {count['problems']:,} left out:")
            lines += (f"    {problem}" for problem in self.problems)
            if count["problems"] > len(self.problems):
                lines.append("    …")
            lines.append(f"  all of them: {self.listed}")
        return "\n".join(lines)


def import_data(options: Import) -> ImportReport:
    """Write records of a data set of another format.

    What cannot be used is left out, counted, and listed with its reason in `OUT.problems.jsonl`.

    Raises:
        DataError: the source cannot be read at all, or nothing in it can be used.
        OptionError: the output is the source.
        FileError: a file cannot be written.
        MissingLibraryError: HanTa is missing where expressions are to be tagged.
    """
    listed = Path(f"{options.out}.problems.jsonl")
    check_distinct(options.source, out=options.out, problems=listed)
    report = ImportReport(options.source, options.out)
    clips = Clips(options.part(Decoding))
    try:
        with record_writer(listed) as list_problem:

            def note(error: DataError) -> None:
                report.counts["problems"] += 1
                if len(report.problems) < SHOWN:
                    report.problems.append(error)
                list_problem({part: getattr(error, part) for part in ("source", "record", "name", "key", "reason")})

            with suppress(_NothingError), record_writer(options.out) as write:
                _run(Job(options, clips, Names.read(options.names), note), report, write)
    finally:
        clips.close()
    if report.counts["problems"]:
        report.listed = listed
    else:
        listed.unlink()
    if not report.counts["records"]:
        first = f"; first: {report.problems[0]}; all problems: {listed}" if report.listed else ""
        raise DataError(f"nothing in it can be used{first}", source=options.source)
    return report


class _NothingError(Exception):
    """No record was made: what is there under the name of the output stays."""


def _run(job: Job, report: ImportReport, write: Callable[[dict], None]) -> None:
    options = job.options
    with ProgressBar(desc="reading", unit="unit", disable=not options.progress) as bar:
        source = FORMATS[options.format](job)
        units = _chosen(source.units, options)
        bar.reset(len(units))
        bar.set_description("importing")
        for record in _records(source, units, job, report, bar):
            write(record)
            _count(record, report.counts)
            if report.counts["records"] == options.limit:
                break
    if not report.counts["records"]:
        raise _NothingError


def _chosen(units: Sequence[Any], options: Import) -> Sequence[Any]:
    if options.clips is None:
        return units
    known = {str(unit): unit for unit in units}
    wanted = read_lines(Path(options.clips))
    if unknown := [name for name in wanted if name not in known]:
        raise DataError(f"{options.source} has no {unknown[0]!r}; correct the list", source=options.clips)
    return [known[name] for name in wanted]


def _records(source: Format, units: Sequence[Any], job: Job, report: ImportReport, bar: ProgressBar) -> Iterator[dict]:
    for unit in units:
        report.counts["units"] += 1
        with job.noting(**({"record": unit} if isinstance(unit, int) else {"name": unit})):
            yield from source.records(unit)
        bar.update()


def _count(record: dict, counts: Counter) -> None:
    annotation = record.get("annotation") or []
    counts.update(records=1, tags=len(annotation), masks=sum(len(frames or ()) for frames in annotation))
