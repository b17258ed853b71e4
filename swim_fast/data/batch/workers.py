"""Worker processes of data loaders: their signals and their memory."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import threading
from collections.abc import Callable

from torch.utils.data import get_worker_info

KEPT = 2**30  # bytes of free memory at the heap's end that a worker keeps
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def start_worker(then: Callable[[int], None] | None, worker_id: int) -> None:
    """Keep a loader's worker running when a launcher or scheduler signals every process of the run; a `worker_init_fn`.

    Else the worker would end, and with it the run, instead of the checkpoint that `StopOnSignal` is about to save. Only
    the worker's own parent ends it.

    Args:
        then: `worker_init_fn` to call afterwards, or None.
    """
    parent = os.getppid()

    def wait():
        from_parent = False
        while not from_parent and os.getppid() == parent:
            from_parent = signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()
    if then is not None:
        then(worker_id)


def keep_freed_memory() -> None:
    """Keep what a clip's pixels took for the next clip's, from the first call in a worker process on.

    A long clip passes through several tensors of hundreds of megabytes. glibc returns blocks of that size to the system
    when they are freed and asks for new ones, page by page, for the next: half of a worker's time. The price is that a
    worker holds the most it has ever needed. Outside workers, and without glibc, nothing is done.
    """
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
