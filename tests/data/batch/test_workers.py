import json
import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.options import Source

PAGES = 64 * 2**20 // resource.getpagesize()
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to keep memory")


def page_faults(record=None) -> int:
    """Of two tensors of 64 MB that are written and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 * 2**20).fill_(1.0).add(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


class Other(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return page_faults()


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]
    path = tmp_path / "texts.jsonl"
    path.write_text(30 * (json.dumps({"conversations": turns}) + "\n"))
    return SwimDataset([Source(path=str(path))], page_faults)


def load(dataset: Dataset, workers: int) -> list[int]:
    return list(DataLoader(dataset, batch_size=None, num_workers=workers))


def faults(dataset: Dataset, workers: int) -> list[int]:
    """In a new process: the heap of one that has run other tests may have free blocks of that size, which are taken."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(load, dataset, workers).result()


def test_a_worker_keeps_the_memory_of_the_last_clip(dataset):
    assert min(faults(Other(), 1)) > PAGES  # each time anew; huge pages would be fewer
    kept = faults(dataset, 1)[10:]  # once the heap has grown, which it does now and then
    assert sum(kept) < len(kept) * PAGES / 4


def test_a_process_without_a_loader_above_it_is_left_alone(dataset):
    assert min(faults(dataset, 0)) > PAGES
