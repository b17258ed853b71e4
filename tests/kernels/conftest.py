"""Fixtures of the kernel tests."""

import pytest
import torch

from swim_kernels.attention_rows import row_groups
from tests.kernels import device as device_of_kernels
from tests.kernels.noun_attention_cases import torch_backend


@pytest.fixture(scope="session", autouse=True)
def device_of_triton(device):
    device_of_kernels.DEVICE = device


@pytest.fixture(params=["by range", "by sequence"])
def grouping(request, monkeypatch):
    """The way of accelerators, where the metadata may not be looked at, is run on the CPU as well."""
    if request.param == "by sequence":
        monkeypatch.setattr(row_groups, "can_look", lambda queries: False)
        for module in (row_groups, torch_backend):
            monkeypatch.setattr(module, "add_at", lambda out, i, values: out.index_put_((i,), values, accumulate=True))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 keys, whatever the number of rows and heads."""
    monkeypatch.setattr(row_groups, "_CHUNK_SCORES_CPU", 1)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
