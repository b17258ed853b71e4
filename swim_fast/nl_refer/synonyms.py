"""Variants of a set in which tagged nouns are replaced by synonyms: does a model find the object by another name?"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import ROLES, RecordFile
from swim_fast.errors import UserError, printable
from swim_fast.jobs import Synonyms
from swim_fast.nl_refer.english.expressions import split_words
from swim_fast.nl_refer.english.inflection import pluralize, takes_an
from swim_fast.nl_refer.output import check_distinct, media_note, record_writer
from swim_fast.progress_bar import ProgressBar

logger = logging.getLogger(__name__)

_TAG = re.compile(r"(?:(?<!\w)(an?)(\s+))?<ins>(\s*)(.*?)(\s*)</ins>", re.IGNORECASE | re.DOTALL)


class TableError(UserError, ValueError):
    """A table of synonyms that cannot be used."""


class SynonymTable:
    """Synonyms by noun, in singular and plural.

    Args:
        path: TSV file of one's own: noun, tab, synonyms with commas; `#` begins a comment. Its nouns replace those of
            the table that is built in, and a noun without synonyms is taken out of it.

    Raises:
        TableError: the file cannot be read, or a line is not of this form.
    """

    def __init__(self, path: str | Path | None = None):
        rows = _rows(files("swim_fast.nl_refer").joinpath("synonyms.tsv").read_text(encoding="utf-8"), "synonyms.tsv")
        if path is not None:
            try:
                rows |= _rows(Path(path).read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise TableError(f"--table {path} cannot be read: {error}") from error
        self.singular = rows
        self.plural = {pluralize(noun): tuple(map(pluralize, synonyms)) for noun, synonyms in rows.items()}

    def __len__(self) -> int:
        return sum(bool(synonyms) for synonyms in self.singular.values())

    def of(self, noun: str) -> tuple[str, ...]:
        """Return the synonyms of a noun in its own number, in lower case but for names; empty if none is known."""
        word = noun.lower()
        return self.singular[word] if word in self.singular else self.plural.get(word, ())


def _rows(text: str, source: str) -> dict[str, tuple[str, ...]]:
    rows = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].rstrip()
        if not line:
            continue
        noun, _, synonyms = line.partition("\t")
        listed = tuple(word.strip() for word in synonyms.split(",") if word.strip())
        for word in (noun, *listed):
            if not re.fullmatch(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", word):
                raise TableError(
                    f"{source}, line {number}: {word!r} is not one word; expected noun, tab, synonyms with commas"
                )
        rows[noun.lower()] = listed
    return rows


@dataclass
class VariantReport:
    """Outcome of `write_variant`; `str` is for people.

    Attributes:
        source, out: files that were read and written.
        missing: "keep" or "drop": what was done with records without a known synonym.
        counts: records; changed; partly (of those, with tags left as they were); tags, replaced (in questions);
            unknown (records with tags, of which none has a synonym); untagged; malformed.
        unknown_nouns: tagged nouns without synonym.
    """

    source: str | Path
    out: Path
    missing: str
    counts: Counter = field(default_factory=Counter)
    unknown_nouns: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        count, done = self.counts, {"keep": "kept as they are", "drop": "left out"}[self.missing]
        lines = [
            f"{count['records']:,} records, {count['changed']:,} changed: "
            f"{count['replaced']:,} of {count['tags']:,} nouns tagged in questions replaced"
        ]
        if count["partly"]:
            lines.append(f"  {count['partly']:,} of the changed records have other nouns without a known synonym")
        if count["unknown"]:
            lines.append(f"  {count['unknown']:,} records without a known synonym: {done}")
        if count["untagged"]:
            lines.append(f"  {count['untagged']:,} records without a tagged noun in a question: {done}")
        if count["malformed"]:
            lines.append(f"  {count['malformed']:,} malformed records: left out")
        if self.unknown_nouns:
            common = ", ".join(f"{printable(noun)} ({number:,})" for noun, number in self.unknown_nouns.most_common(12))
            lines.append(f"  nouns without a known synonym, give some with --table: {common}")
        return "\n".join([*lines, f"  output: {self.out}", *media_note(self.source, self.out)])


def write_variant(options: Synonyms, progress: bool = True) -> VariantReport:
    """Write a file in which the nouns tagged in questions are replaced by synonyms; answers stay as they are.

    Number and capitals of a noun are kept, an article before it is corrected, and a noun that a record tags twice is
    replaced by the same synonym. A synonym that the record's questions already use is not taken. Changed records say in
    a field `synonyms` what was replaced by what. The choice depends on the seed and the record's index alone.

    Raises:
        DataError: the file cannot be read at all.
        TableError: the table cannot be read or is malformed.
        OptionError: two of the files are the same one.
        FileError: the file cannot be written.
    """
    check_distinct(options.file, out=options.out, table=options.table)
    table, records = SynonymTable(options.table), RecordFile(options.file)
    count = min(len(records), options.limit or len(records))
    report = VariantReport(options.file, Path(options.out), options.missing)
    with record_writer(options.out) as write:
        for index in ProgressBar(range(count), unit="record", disable=not progress):
            report.counts["records"] += 1
            try:
                entry = records.entry(index)
                records.parse(entry, index)
            except DataError as error:
                report.counts["malformed"] += 1
                logger.warning("%s", error)
                continue
            changed = _replace_nouns(entry, table, random.Random(f"{options.seed} {index}"), report)
            if changed is not None or options.missing == "keep":
                write(entry if changed is None else changed)
    return report


def _replace_nouns(entry: dict, table: SynonymTable, rng: random.Random, report: VariantReport) -> dict | None:
    questions = [ROLES[turn["from"]] == "user" for turn in entry["conversations"]]
    used = {
        word
        for turn, asks in zip(entry["conversations"], questions, strict=True)
        if asks
        for word in split_words(re.sub(r"</?ins>", "", turn["value"]))
    }
    chosen: dict[str, str] = {}
    tags = missed = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal tags, missed
        article, gap, before, noun, after = match.groups()
        tags += 1
        if noun.lower() not in chosen:
            options = [synonym for synonym in table.of(noun) if synonym.lower() not in used]
            if not options:
                missed += 1
                report.unknown_nouns[noun.lower()] += 1
                return match.group()
            chosen[noun.lower()] = rng.choice(options)
        synonym = _in_case_of(chosen[noun.lower()], noun)
        if article:
            article = article[0] + ("n" if takes_an(synonym) else "")
        return f"{article or ''}{gap or ''}<ins>{before}{synonym}{after}</ins>"

    turns = [
        {**turn, "value": _TAG.sub(replace, turn["value"])} if asks else turn
        for turn, asks in zip(entry["conversations"], questions, strict=True)
    ]
    report.counts.update(
        tags=tags,
        replaced=tags - missed,
        changed=bool(chosen),
        partly=bool(chosen and missed),
        unknown=bool(tags and not chosen),
        untagged=not tags,
    )
    return {**entry, "conversations": turns, "synonyms": chosen} if chosen else None


def _in_case_of(synonym: str, noun: str) -> str:
    if noun.isupper() and len(noun) > 1:
        return synonym.upper()
    return synonym[0].upper() + synonym[1:] if noun[0].isupper() else synonym
