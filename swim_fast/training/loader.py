"""Data loaders whose workers died or hang, told with the remedy."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from swim_fast.errors import UserError

SHARED = "/dev/shm"  # where workers leave their batches
_SIGNS = ("DataLoader worker (pid", "DataLoader timed out", "shared memory", "shm", "received 0 items of ancdata")


class LoaderError(UserError, RuntimeError):
    """Data workers that give no more batches; the message says what they had and the remedy."""


@contextlib.contextmanager
def explain_loader() -> Iterator[None]:
    """Turn torch's errors about workers and shared memory into a `LoaderError`.

    A worker that finds /dev/shm full loses its batch without a word to the loader, which would wait for ever without a
    time limit.
    """
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        free = f" ({SHARED}: {shutil.disk_usage(SHARED).free / 2**20:,.0f} MiB free)" if os.path.isdir(SHARED) else ""
        raise LoaderError(
            f"the data workers give no more batches: {reason}. If {SHARED} is full{free}, enlarge it (docker run "
            "--shm-size) or lower training.dataloader_num_workers; if one was killed for memory, lower the same; if "
            "clips are that slow, raise data.batch_timeout. Then resume with --resume"
        ) from error
