"""Memory counts against cases with a known answer."""

import torch

from benchmarks.memory import count_allocations, watch_saved


def test_peak_marks_and_end():
    with count_allocations() as counted:
        first = torch.empty(1000, dtype=torch.float32)  # 4000
        second = torch.empty(500, dtype=torch.float64)  # 8000
        counted.mark("both")
        del second
        third = torch.empty(100, dtype=torch.uint8)  # 4100
        counted.mark("after")
    assert (counted.peak, counted.end) == (8000, 4100)
    assert counted.held == {"both": 8000, "after": 4100}
    del first, third


def test_memory_from_before_is_not_counted():
    before = torch.ones(10_000)
    with count_allocations() as counted:
        del before
        kept = torch.empty(25, dtype=torch.int64)
    assert (counted.peak, counted.end) == (200, 200)
    with count_allocations() as again:  # nor is memory of an earlier count
        del kept
        torch.empty(7, dtype=torch.uint8)
    assert again.peak == 7


def test_temporaries_inside_an_operator():
    """The softmax of a bf16 tensor in fp32 casts its input first: the cast is there beside the result."""
    x = torch.randn(64, 100).bfloat16()
    with count_allocations() as counted:
        y = torch.softmax(x.t(), dim=-1, dtype=torch.float32)
    assert counted.end == 4 * y.numel()
    assert counted.peak >= 2 * 4 * y.numel()


def test_forward_and_backward():
    """x · y keeps nothing new, its exponential keeps its result; backward holds two more at a time."""
    x, y = (torch.randn(1000, requires_grad=True) for _ in range(2))
    gradient = torch.ones(1000)
    with count_allocations() as counted, watch_saved([x, y]) as saved:
        z = (x * y).exp()
        counted.mark("forward")
        assert saved.bytes == 4000
        dx, dy = torch.autograd.grad(z, (x, y), gradient)
    assert counted.held["forward"] == 4000
    assert counted.peak == 4 * 4000  # z, ∂(x · y), ∂x, ∂y
    assert counted.end == 3 * 4000
    del dx, dy


def test_saved_tensors_count_once_by_storage_and_only_while_held():
    x = torch.randn(30, 40, requires_grad=True)
    with watch_saved([x]) as saved:
        e = x.exp()  # saves e
        f = (e[:10] * e[10:20]).sum() + (e * x).sum()  # views of e, e itself, x: nothing new
        assert saved.bytes == 30 * 40 * 4
        assert ((30, 40), torch.float32) in saved.shapes()
        assert ((10, 40), torch.float32) in saved.shapes()
        g = x[0].double().exp()
        assert saved.bytes == 30 * 40 * 4 + 40 * 8
        assert saved.shapes()[-1] == ((40,), torch.float64)
        del g
        assert saved.bytes == 30 * 40 * 4
    f.backward()
    del e, f
    assert saved.bytes == 0


def test_a_view_keeps_its_whole_storage():
    with watch_saved() as saved:
        y = torch.zeros(1000)[:10].requires_grad_().square()
        assert saved.bytes == 4000
    assert saved.shapes() == [((10,), torch.float32)]
    del y
