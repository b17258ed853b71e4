"""VideoRefer and PixelRefer: conversations in which `<object1><region>` or `<region>` stand for an object with masks.

VideoRefer has the masks in `annotation`, PixelRefer in `masks`; both are read as records are.
"""

from __future__ import annotations

from collections.abc import Iterator

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import read_turns
from swim_fast.importing.formats.conversations import RecordsOfFile
from swim_fast.nl_refer.english.rules import UnclearError, name_objects
from swim_fast.nl_refer.placeholders import check_rest, find_task, replace_placeholders
from swim_fast.nl_refer.validation import RejectedError, check_expressions


class Placeholders(RecordsOfFile):
    """Records whose placeholders become tagged nouns, by the rules of `swim-fast nl-refer build`."""

    def records(self, unit: int) -> Iterator[dict]:
        """Yield the record."""
        entry = self.read(self.file.raw(unit))
        task = find_task(entry, unit)
        if task is None:
            entry = entry if any("<ins>" in turn.text for turn in read_turns(entry)) else entry | {"annotation": []}
            self.file.parse(entry, unit)
            yield entry
            return
        check_rest(self.file, entry, task)
        try:
            expressions = name_objects(task.mentions())
            check_expressions(task, expressions)
        except (UnclearError, RejectedError) as error:
            remedy = "a language model may tell: swim-fast nl-refer build --rewriter openai"
            raise DataError(f"{error}; {remedy}", key="conversations") from None
        yield replace_placeholders(entry, task, expressions)
