import platform
import resource

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from swim_fast.data.worker_memory import keep_freed_memory

PAGES = 64 * 2**20 // resource.getpagesize()


class Faults(Dataset):
    """Item i: page faults of two tensors of 64 MB that are written and freed, the i-th time in its process."""

    def __init__(self, keep: bool):
        self.keep = keep

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if self.keep:
            keep_freed_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(16 * 2**20).fill_(1.0).add(1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults(keep: bool, workers: int) -> list[int]:
    return list(DataLoader(Faults(keep), batch_size=None, num_workers=workers))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to keep memory")
def test_a_worker_keeps_the_memory_of_the_last_clip():
    anew, kept = faults(False, 1), faults(True, 1)
    assert min(anew) > PAGES  # huge pages would be fewer
    assert sum(kept[5:]) < PAGES / 10  # once the heap has grown
    assert all(count > PAGES for count in faults(True, 0))  # and not in the process that has no loader above it
