"""Raw VideoRefer to NL-Refer: the run over a whole file, by a language model or by rules.

What becomes of a record:

- placeholders in its questions: each is replaced by an expression with a tagged noun, its masks follow the tags (see
  `swim_fast.nl_refer.placeholders`); answers are not touched. One object named twice keeps one noun.
- no placeholder: passed through; masks that nothing in the text refers to are left out, as nothing could use them.
- ``<ins>`` tags already: passed through.
- everything else fails: it is not in the output, but in the review file, with the reason. These are malformed records,
  placeholders in answers or without masks, answers that never name the object, and expressions that were rejected by
  the rules of `swim_fast.nl_refer.validation` in every attempt.

A model's answers go to a journal (`swim_fast.llm.journal`) as they arrive, and the output is made from the journal
in the order of the input when all are there. So a run may be stopped or killed at any time: the same command goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile
from swim_fast.llm.endpoint import EndpointOptions
from swim_fast.llm.journal import Journal
from swim_fast.nl_refer.asking import Asked, AskOptions, ask_all
from swim_fast.nl_refer.english.rules import rules_expressions
from swim_fast.nl_refer.files import RecordWriter, check_distinct, media_note
from swim_fast.nl_refer.placeholders import BINDINGS, Expression, Task, check_rest, find_task, replaced
from swim_fast.nl_refer.validation import MAX_WORDS, RejectedError, check_expressions

REWRITERS = ("rules", "openai")


@dataclass(frozen=True)
class BuildOptions:
    """How a file is rewritten.

    Attributes:
        rewriter: "rules", offline and without cost, or "openai", a language model.
        endpoint: of the model; must be given for it.
        binding: see `find_task`.
        max_words: most words of an expression.
        attempts: how often the model may answer for one record.
        limit: only so many records, from the first; None for all.
        price_in, price_out: of a million tokens, in any currency.
        dry_run: write and ask nothing; estimate.
        progress: show a progress bar.

    Raises:
        ValueError: for a value outside its range, and options that do not go together.
    """

    rewriter: str = "rules"
    endpoint: EndpointOptions | None = None
    binding: str = "number"
    max_words: int = MAX_WORDS
    attempts: int = 3
    limit: int | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    dry_run: bool = False
    progress: bool = True

    def __post_init__(self):
        if self.rewriter not in REWRITERS:
            raise ValueError(f"--rewriter is {self.rewriter!r}; it must be one of {', '.join(REWRITERS)}")
        if self.binding not in BINDINGS:
            raise ValueError(f"--bind is {self.binding!r}; it must be one of {', '.join(BINDINGS)}")
        if (self.rewriter == "openai") != (self.endpoint is not None):
            raise ValueError("--rewriter openai needs a --model, and --model needs --rewriter openai")
        for name in ("max_words", "attempts", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if min(self.price_in, self.price_out) < 0:
            raise ValueError("--price-in and --price-out must not be negative")


@dataclass
class BuildReport:
    """What came of a run; ``str`` is for people.

    Attributes:
        source: the file that was read.
        out, review: the files that were written; None if none was.
        counts: records; rewritten, with how many tags; passed (without placeholder); failed; masks_left_out (objects
            that no placeholder names); contested (records whose placeholders are numbered in another order than they
            stand in).
        reasons: failed records by kind.
        asked: what the model was asked and cost; None for the rules.
        dry_run: whether nothing was written or asked.
    """

    source: str | Path
    out: Path | None = None
    review: Path | None = None
    counts: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    asked: Asked | None = None
    dry_run: bool = False

    def __str__(self) -> str:
        count = self.counts
        lines = [f"{count['records']:,} records"]
        if count["rewritten"]:
            lines.append(f"  {count['rewritten']:,} rewritten, with {count['tags']:,} tagged nouns")
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
        if self.asked is not None:
            lines += self.asked.lines(self.dry_run)
        lines += [f"  {name}: {path}" for name, path in (("output", self.out), ("failures", self.review)) if path]
        return "\n".join(lines + (media_note(self.source, self.out) if self.out else []))


@dataclass(frozen=True)
class _Failure:
    kind: str
    reason: str
    answer: str | None = None


def build(
    source: str | Path,
    out: str | Path,
    options: BuildOptions,
    *,
    journal: str | Path | None = None,
    review: str | Path | None = None,
) -> BuildReport:
    """Rewrite a file of raw VideoRefer records.

    Args:
        source: JSON list or JSONL.
        out: the NL-Refer file; a JSON list if its name ends in ``.json``, else JSONL. Media paths stay as they are:
            from another folder than the source's, the source's must be given as ``media``.
        options: how.
        journal: file of the model's answers; by default beside ``out``.
        review: file of the failures; by default beside ``out``. None is left behind where nothing failed.

    Raises:
        DataError: the source cannot be read at all.
        ValueError: files that are the same one.
        OSError: files that cannot be written; an endpoint that cannot be used, see `EndpointError`.
        ImportError: HanTa or openai is missing.
    """
    review = Path(f"{out}.review.jsonl" if review is None else review)
    journal = Path(f"{out}.journal.jsonl" if journal is None else journal)
    check_distinct(source, out=out, review=review, journal=journal)
    records = RecordFile(source)
    count = len(records) if options.limit is None else min(options.limit, len(records))
    report = BuildReport(source, dry_run=options.dry_run)
    if options.rewriter == "rules":
        _write(records, count, options, out, review, report, lambda task, _: _by_rules(task, options.max_words))
        return report
    # A dry run makes no journal, but reads one that is there.
    with nullcontext() if options.dry_run and not journal.exists() else Journal(journal) as answers:
        asking = AskOptions(options.endpoint, options.binding, options.max_words, options.attempts, options.progress)
        report.asked = Asked((options.price_in, options.price_out))
        settled = ask_all(records, count, asking, answers, report.asked, dry_run=options.dry_run)
        if options.dry_run:
            report.counts.update(records=count)
            return report

        def by_model(task: Task, entry: dict) -> Sequence[Expression] | _Failure:
            outcome = settled(task, entry)
            return outcome.expressions or _Failure(outcome.kind, outcome.reason, outcome.answer)

        _write(records, count, options, out, review, report, by_model)
    return report


def _by_rules(task: Task, max_words: int) -> Sequence[Expression] | _Failure:
    try:
        expressions = rules_expressions(task)
        check_expressions(task, expressions, max_words)
    except RejectedError as error:
        return _Failure("not clearly named, as far as the rules can tell", str(error))
    return expressions


def _write(
    records: RecordFile,
    count: int,
    options: BuildOptions,
    out: str | Path,
    review: Path,
    report: BuildReport,
    rewrite: Callable[[Task, dict], Sequence[Expression] | _Failure],
) -> None:
    """Make the output and the review file from what ``rewrite`` returns for each record."""
    from tqdm import tqdm

    def write_all(output: RecordWriter | None, failures: RecordWriter | None) -> None:
        for number in tqdm(range(count), desc="writing", unit="record", disable=not options.progress):
            result, entry = _converted(records, number, options.binding, report.counts, rewrite)
            report.counts["records"] += 1
            if not isinstance(result, _Failure):
                if output:
                    output.write(result)
                continue
            report.counts["failed"] += 1
            report.reasons[result.kind] += 1
            if failures:
                failures.write(_review_entry(number, entry, result))

    if options.dry_run:
        write_all(None, None)
        return
    with RecordWriter(out) as output, RecordWriter(review) as failures:
        write_all(output, failures)
    report.out = Path(out)
    if report.counts["failed"]:
        report.review = review
    else:
        review.unlink(missing_ok=True)


def _converted(
    records: RecordFile, number: int, binding: str, counts: Counter, rewrite: Callable
) -> tuple[dict | _Failure, dict | None]:
    """The record of the output or why there is none, and the raw record if it could be read."""
    entry = None
    try:
        entry = records.raw(number)
        task = find_task(entry, number, binding)
        if task is None:
            result = _without_loose_masks(entry, counts)
            records.parse(result, number)
            counts["passed"] += 1
            return result, entry
        check_rest(records, entry, task)
        expressions = rewrite(task, entry)
        if isinstance(expressions, _Failure):
            return expressions, entry
        result = replaced(entry, task, expressions)
    except DataError as error:
        return _Failure("malformed, or without what a rewriter needs", str(error)), entry
    counts.update(rewritten=1, tags=len(task.placeholders), masks_left_out=task.unnamed, contested=int(task.contested))
    return result, entry


def _without_loose_masks(entry: dict, counts: Counter) -> dict:
    """A record without placeholders; its masks are dropped if it has no tags either."""
    annotation = entry.get("annotation")
    tagged = any("<ins>" in turn["value"] for turn in entry["conversations"])
    if tagged or not isinstance(annotation, list) or not annotation:
        return entry
    counts["masks_left_out"] += len(annotation)
    return {**entry, "annotation": []}


def _review_entry(number: int, entry: dict | None, failure: _Failure) -> dict:
    shown = ("index", "id", "video", "conversations")  # the masks would fill the file
    raw = {key: entry[key] for key in shown if key in entry} if entry else {}
    return {"record": number, "reason": failure.reason, "answer": failure.answer, **raw}
