"""What the formats of one run share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from swim_fast.data.source.errors import DataError
from swim_fast.importing.clips import Clips
from swim_fast.importing.sources import Names
from swim_fast.jobs import Import


@dataclass
class Job:
    """What formats share: options, clips, names, and the list of what is left out."""

    options: Import
    clips: Clips
    names: Names
    note: Callable[[DataError], None]

    @contextmanager
    def noting(self, **where: str | int | None) -> Iterator[None]:
        """Take the DataErrors of the block; `where` is added to them."""
        try:
            yield
        except DataError as error:
            self.note(error.within(**where))
