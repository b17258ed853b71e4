"""`on_device`: strides, gaps and leaves survive; structs and sequences come along."""

import torch

from tests.kernels.device import on_device, triton_on_device
from tests.kernels.noun_attention_cases import make_queries, strided

META = torch.device("meta")


def test_strides_and_leaves_survive():
    for layout in ("contiguous", "transposed", "sliced", "head_dim first"):
        x = strided(torch.rand(2, 3, 5, 4).bfloat16(), layout).requires_grad_()
        moved = on_device(x, META)
        assert moved.is_leaf and moved.requires_grad and moved.device == META
        assert (moved.stride(), moved.storage_offset()) == (x.stride(), x.storage_offset())
    expanded = torch.ones(()).expand(3, 4)
    assert on_device(expanded, META).stride() == (0, 0)
    assert on_device(torch.empty(0, 3), META).shape == (0, 3)


def test_structs_and_sequences_come_along():
    queries = make_queries([(0, 5, 0, 6, 0)], [[1, 2]])
    moved, (number, nothing, x) = on_device((queries, [7, None, torch.ones(3)]), META)
    assert moved.device == x.device == META and (number, nothing) == (7, None)
    assert on_device(moved, META) is moved and on_device(x, META) is x


def test_results_come_back(monkeypatch):
    from tests.kernels import device

    monkeypatch.setattr(device, "DEVICE", META)
    seen = []

    @triton_on_device
    def run(x, *, lse=None, backend):
        seen.append((x.device, lse.device))
        return torch.zeros(3), backend

    x = torch.ones(3)
    assert run(x, lse=x, backend="torch")[0].device.type == "cpu"
    result, name = run(x, lse=x, backend="triton")
    assert result.device.type == "cpu" and name == "triton"
    assert seen == [(x.device, x.device), (META, META)]
