"""Memory of loader workers: what a clip's pixels took is kept for the next clip's.

A long clip passes through several tensors of hundreds of megabytes. glibc returns blocks of that size to the system
when they are freed and asks for new ones, page by page, for the next: that is half of a worker's time. What keeping
them costs is the most that a worker has ever held at once, for as long as it lives.
"""

from __future__ import annotations

import ctypes
import functools

from torch.utils.data import get_worker_info

KEPT = 2**30  # bytes of free memory at the heap's end that a worker holds on to
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """In a worker process of a loader, from the first call on; elsewhere, and without glibc, does nothing."""
    if get_worker_info() is not None:
        _keep()


@functools.cache
def _keep() -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, KEPT)
