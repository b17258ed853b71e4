"""Raw VideoRefer to NL-Refer: the run over a whole file, by a language model or by rules.

What becomes of a record:

- placeholders in its questions: each is replaced by an expression with a tagged noun, its masks follow the tags (see
  `swim_fast.nl_refer.placeholders`); answers are not touched. One object named twice keeps one noun.
- no placeholder: passed through; masks that nothing in the text refers to are left out, as nothing could use them.
- `<ins>` tags already: passed through.
- everything else fails: it is not in the output, but in the review file, with the reason. These are malformed records,
  placeholders in answers or without masks, answers that never name the object, and expressions that were rejected by
  the rules of `swim_fast.nl_refer.validation` in every attempt.

A model's answers go to a journal (`swim_fast.llm.settle`) as they arrive. When all are there, the output is made from
the journal in the order of the input. So a run may be stopped or killed at any time: the same command resumes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile
from swim_fast.errors import name_count
from swim_fast.jobs import Build
from swim_fast.llm.journal import Journal
from swim_fast.llm.settle import Settler, Usage
from swim_fast.nl_refer.asking import find_requests, make_request
from swim_fast.nl_refer.english.expressions import Expression
from swim_fast.nl_refer.english.rules import UnclearError, name_objects
from swim_fast.nl_refer.output import check_distinct, media_note, record_writer
from swim_fast.nl_refer.placeholders import Task, check_rest, find_task, replace_placeholders
from swim_fast.nl_refer.validation import RejectedError, check_expressions
from swim_fast.progress_bar import ProgressBar


@dataclass
class BuildReport:
    """Outcome of a run; `str` is for people.

    Attributes:
        source: file that was read.
        out, review: files that were written; None if none was.
        counts: records; rewritten, with how many tags; passed (without placeholder); failed; masks_left_out (objects
            that no placeholder names); contested (records whose placeholders are numbered in another order than they
            stand in).
        reasons: failed records by kind.
        usage: what the model was asked and cost; None for the rules.
        dry_run: nothing was written or asked.
    """

    source: str | Path
    out: Path | None = None
    review: Path | None = None
    counts: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    usage: Usage | None = None
    dry_run: bool = False

    def __str__(self) -> str:
        count = self.counts
        lines = [name_count(count["records"], "record")]
        if count["rewritten"]:
            lines.append(f"  {count['rewritten']:,} rewritten, with {name_count(count['tags'], 'tagged noun')}")
        if count["passed"]:
            lines.append(f"  {count['passed']:,} passed through: they have no placeholder")
        if count["masks_left_out"]:
            lines.append(f"  {count['masks_left_out']:,} objects with masks that no placeholder names: left out")
        if count["contested"]:
            lines.append(
                f"  {count['contested']:,} records number their placeholders in another order than they stand in; "
                "see --bind"
            )
        if count["failed"]:
            lines.append(f"  {count['failed']:,} failed:")
            lines += (f"    {number:,} {reason}" for reason, number in self.reasons.most_common())
        if self.usage is not None:
            lines += self.usage.lines(self.dry_run)
        lines += [f"  {name}: {path}" for name, path in (("output", self.out), ("failures", self.review)) if path]
        return "\n".join(lines + (media_note(self.source, self.out) if self.out else []))


@dataclass(frozen=True)
class _Failure:
    kind: str
    reason: str
    answer: str | None = None


def build(options: Build) -> BuildReport:
    """Rewrite a file of raw VideoRefer records.

    Media paths stay as they are: if the output lies in another folder than the source, the source's folder must be
    given as `media` where the output is used. No review file is left behind if nothing failed.

    Raises:
        DataError: the source cannot be read at all.
        OptionError: two of the files are the same one.
        FileError: a file cannot be written.
        EndpointError: the endpoint cannot be used.
        MissingLibraryError: HanTa or openai is missing.
    """
    review = Path(options.review or f"{options.out}.review.jsonl")
    journal = Path(options.journal or f"{options.out}.journal.jsonl")
    check_distinct(options.file, out=options.out, review=review, journal=journal)
    records = RecordFile(options.file)
    count = min(len(records), options.limit or len(records))
    report = BuildReport(options.file, dry_run=options.dry_run)
    if options.rewriter == "rules":
        _write(records, count, options, review, report, lambda task, _: _ask_rules(task, options.max_words))
        return report
    # A dry run makes no journal, but reads one that is there.
    with nullcontext() if options.dry_run and not journal.exists() else Journal(journal) as answers:
        settler = Settler(
            options.endpoint(options.model), answers, options.attempts, (options.price_in, options.price_out)
        )
        report.usage = usage = settler.usage
        how = {"model": options.model, "max_words": options.max_words}
        requests = find_requests(records, count, options.bind, **how)
        if options.dry_run:
            settler.estimate(requests, count, "asking", options.progress)
            report.counts.update(records=count)
            return report
        settler.settle(requests, count, "asking", options.progress)

        def rewrite(task: Task, entry: dict) -> Sequence[Expression] | _Failure:
            request = make_request(task, entry, **how)
            for answer in settler.answers(request):
                usage.kept_in += answer.tokens_in
                usage.kept_out += answer.tokens_out
            outcome = settler.outcome(request)
            if outcome.result is not None:
                return outcome.result
            if outcome.refused:
                kind = "refused by the endpoint; the next run asks again"
            else:
                kind = "never named, says the model" if outcome.final else "rejected in every attempt"
            return _Failure(kind, outcome.reason, outcome.answers[-1] if outcome.answers else None)

        _write(records, count, options, review, report, rewrite)
    return report


def _ask_rules(task: Task, max_words: int) -> Sequence[Expression] | _Failure:
    try:
        expressions = name_objects(task.mentions())
        check_expressions(task, expressions, max_words)
    except (UnclearError, RejectedError) as error:
        return _Failure("not clearly named, as far as the rules can tell", str(error))
    return expressions


def _write(
    records: RecordFile,
    count: int,
    options: Build,
    review: Path,
    report: BuildReport,
    rewrite: Callable[[Task, dict], Sequence[Expression] | _Failure],
) -> None:
    """Make the output and the review file from what `rewrite` returns for each record."""
    dry = nullcontext(lambda _: None)
    with (
        dry if options.dry_run else record_writer(options.out) as keep,
        dry if options.dry_run else record_writer(review) as fail,
    ):
        for index in ProgressBar(range(count), desc="writing", unit="record", disable=not options.progress):
            result, entry = _convert(records, index, options.bind, report.counts, rewrite)
            report.counts["records"] += 1
            if isinstance(result, _Failure):
                report.counts["failed"] += 1
                report.reasons[result.kind] += 1
                fail(_review_entry(index, entry, result))
            else:
                keep(result)
    if options.dry_run:
        return
    report.out = Path(options.out)
    if report.counts["failed"]:
        report.review = review
    else:
        review.unlink(missing_ok=True)


def _convert(
    records: RecordFile, index: int, binding: str, counts: Counter, rewrite: Callable
) -> tuple[dict | _Failure, dict | None]:
    """Return the record of the output or why there is none, and the raw record if it could be read."""
    entry = None
    try:
        entry = records.entry(index)
        task = find_task(entry, index, binding)
        if task is None:
            result = _drop_loose_masks(entry, counts)
            records.parse(result, index)
            counts["passed"] += 1
            return result, entry
        check_rest(records, entry, task)
        expressions = rewrite(task, entry)
        if isinstance(expressions, _Failure):
            return expressions, entry
        result = replace_placeholders(entry, task, expressions)
    except DataError as error:
        return _Failure("malformed, or without what a rewriter needs", str(error)), entry
    counts.update(rewritten=1, tags=len(task.placeholders), masks_left_out=task.unnamed, contested=int(task.contested))
    return result, entry


def _drop_loose_masks(entry: dict, counts: Counter) -> dict:
    """Return a record that has no placeholders; without its masks if it has no tags either."""
    annotation = entry.get("annotation")
    tagged = any("<ins>" in turn["value"] for turn in entry["conversations"])
    if tagged or not isinstance(annotation, list) or not annotation:
        return entry
    counts["masks_left_out"] += len(annotation)
    return {**entry, "annotation": []}


def _review_entry(index: int, entry: dict | None, failure: _Failure) -> dict:
    shown = ("index", "id", "video", "conversations")  # the masks would fill the file
    raw = {key: entry[key] for key in shown if key in entry} if entry else {}
    return {"record": index, "reason": failure.reason, "answer": failure.answer, **raw}
