"""`swim-fast` over data with one bad sample: python -m tests.training.poisoned FILE train …

Every batch with the clip of that name gets an infinite pixel, so that its loss is NaN.
"""

import sys

from swim_fast.cli import main
from swim_fast.data.batch.collation import Collator

_collate = Collator.__call__


def _with_an_infinite_pixel(self, items):
    batch = _collate(self, items)
    if any(sys.argv[1] in sample for sample in batch["samples"]):
        batch["pixel_values_videos"] = batch["pixel_values_videos"].patches()
        batch["pixel_values_videos"][0, 0] = float("inf")
    return batch


if __name__ == "__main__":
    Collator.__call__ = _with_an_infinite_pixel
    sys.exit(main(sys.argv[2:]))
