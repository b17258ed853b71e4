"""The exceptions for bad data: they say which file, which record, where in it, why, and what to do."""

from __future__ import annotations

import reprlib

from swim_fast.errors import UserError, printable

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: object) -> str:
    """Return the `repr` of a value from a record, cut where it is long or deep."""
    return _SHORT.repr(value)


class RecordsChangedError(UserError):
    """A file of records that was changed or removed while it was in use: no record of it can be trusted any longer.

    It is not a `DataError`, which costs one record alone: it ends the run.
    """


class DataError(UserError, ValueError):
    """A record, clip or mask that cannot be used.

    `str()` reads `clips.jsonl, record 17 (videorefer_17), annotation[0]['36']: <reason>`; parts that are not known are
    left out. Code deep down raises with what it knows and callers add the rest with `within`. Picklable, so it
    crosses process boundaries with its parts intact. Safe to print: what is not printable is written as an escape.

    Args:
        reason: what is wrong, and the remedy.
        source: file the record comes from, as the user gave it.
        record: 0-based index of the record in that file.
        name: the record's own identifier.
        key: place inside the record, such as `annotation[0]['36']` or `video`.
    """

    def __init__(
        self,
        reason: str,
        *,
        source: str | None = None,
        record: int | None = None,
        name: str | None = None,
        key: str | None = None,
    ):
        super().__init__(reason)
        self.reason = printable(self.args[0])
        self.source, self.name, self.key = (text and printable(text) for text in (source, name, key))
        self.record = record

    def __str__(self) -> str:
        where = [self.source] if self.source else []
        if self.record is not None:
            where.append(f"record {self.record}" + (f" ({self.name})" if self.name else ""))
        elif self.name:
            where.append(self.name)
        if self.key:
            where.append(self.key)
        return ", ".join(where) + ": " + self.reason if where else self.reason

    def __reduce__(self):
        return _rebuild, (self.reason, self._parts())

    def _parts(self) -> dict[str, str | int]:
        parts = {"source": self.source, "record": self.record, "name": self.name, "key": self.key}
        return {part: value for part, value in parts.items() if value is not None}

    def within(self, **parts: str | int | None) -> DataError:
        """Return a copy with the parts (`source`, `record`, `name`, `key`) that are not known yet; known ones stay."""
        return DataError(self.reason, **{**parts, **self._parts()})


def _rebuild(reason, parts):
    return DataError(reason, **parts)
