"""The instrument itself: what it counts, where it says that it happened, and what values it gives."""

import torch

from tests.helpers.pretend_gpu import record
from tests.helpers.pretend_gpu.values import CpuValues


def product_and_wait(x):
    return (x @ x.T).sum().item()


def test_launches_copies_and_waits_are_counted_with_their_place():
    x = torch.randn(3, 4, device="cuda")
    with record() as seen:
        product_and_wait(x)
    assert [event.name for event in seen.of("launch")][0] == "cublasSgemm_v2"
    assert seen.count("launch") == 2 and seen.count("wait") == 1
    assert [event.num_bytes for event in seen.of("copy")] == [4]
    assert seen.count("launch", inside="product_and_wait") == 2
    assert "product_and_wait" in seen.of("wait")[0].stack[-1]
    assert "cublasSgemm_v2" in seen.describe("launch")


def test_page_locked_memory_is_copied_without_a_wait():
    pinned, pageable = torch.ones(1000).pin_memory(), torch.ones(1000)
    with record() as seen:
        pinned.to("cuda", non_blocking=True)
    assert pinned.is_pinned() and not pageable.is_pinned()
    assert seen.count("copy") == 1 and seen.count("wait") == 0
    with record() as seen:
        pageable.to("cuda")
    assert seen.count("wait") == 1


def test_values_of_operators_that_the_cpu_has():
    with CpuValues():
        x = torch.arange(12, device="cuda").reshape(3, 4)
        with record() as seen:
            chosen = x[x % 2 == 1]
        assert seen.count("wait") == 1  # as many as are odd
        assert chosen.tolist() == [1, 3, 5, 7, 9, 11]
        weight = torch.ones(4, device="cuda", requires_grad=True)
        (x.float() @ weight).sum().backward()
        assert weight.grad.tolist() == [12.0, 15.0, 18.0, 21.0]
