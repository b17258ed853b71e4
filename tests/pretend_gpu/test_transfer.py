"""Rows, targets and their plans on the way to the device: page-locked, in one copy each, without a wait."""

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from swim_fast.loss.mask_loss import MaskTargets
from swim_kernels.attention_rows.triton import plan as plans
from swim_kernels.runtime import move_together, pin_together
from tests.helpers.pretend_gpu import record
from tests.helpers.pretend_gpu.values import CpuValues
from tests.kernels.noun_attention_cases import make_queries

ROWS = [(0, 5, 0, 6, 0), (1, 7, 2, 8, 1), (1, 7, 3, 8, 0), (0, 2, 0, 3, 1)]
SETS = [[1, 2, 3, 2], [4, 5, 1]]


def targets(count=5):
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(30 + k, 41, generator=generator) > 0.5 for k in range(count)]
    index = torch.arange(count)
    return MaskTargets(index, 12 * index, torch.full((count,), 3), torch.full((count,), 4), index, masks)


def test_several_tensors_in_one_copy():
    tensors = [torch.arange(5), torch.empty(0, 8), torch.tensor([[True], [False]]), torch.randn(3, 4).T]
    pinned = pin_together(tensors)
    for given in (tensors, pinned):
        with record() as seen:
            moved = move_together(given, "cuda")
        assert seen.count("copy") == 1 and not seen.count("wait") and not seen.count("launch")
        with CpuValues():
            for there, tensor in zip(moved, tensors, strict=True):
                assert there.shape == tensor.shape and there.is_contiguous() and there.data_ptr() % 16 == 0
                assert torch.equal(there.cpu(), tensor)
    assert all(tensor.is_pinned() for tensor in pinned if tensor.numel())


@pytest.mark.parametrize("pin", [False, True])
def test_rows_and_targets_in_one_copy_each(pin):
    batch = {"noun_queries": make_queries(ROWS, SETS), "mask_targets": targets()}
    given = pin_memory(batch) if pin else batch
    for name, tensors in (("noun_queries", lambda it: it.tensors()), ("mask_targets", lambda it: it._tensors())):
        with record() as seen:
            moved = given[name].to("cuda", non_blocking=True)
        assert seen.count("copy") == 1 and not seen.count("wait") and not seen.count("launch")
        with CpuValues():
            for there, here in zip(tensors(moved), tensors(batch[name]), strict=True):
                assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("over", ["range", "set"])
def test_a_plan_takes_two_launches_and_one_copy(over):
    rows = make_queries(ROWS, SETS, over=over)
    here = plans.make_plan(rows, 2, 9, 16)
    moved = rows.pin_memory().to("cuda")
    with CpuValues():
        with record() as seen:
            there = plans.plan_of(moved, 2, 9, 16)
            assert plans.plan_of(moved, 2, 9, 16) is there
        assert seen.count("launch") == 2 and seen.count("copy") == 1, seen.describe("launch")
        assert not seen.count("wait"), seen.describe("wait")
        for name in plans.Plan._fields:
            assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name


def test_a_plan_of_rows_that_were_written_to_is_made_of_them():
    moved = make_queries(ROWS, SETS).to("cuda")
    with CpuValues():
        before = plans.plan_of(moved, 2, 9, 16)
        moved.position[0] = 4
        after = plans.plan_of(moved, 2, 9, 16)
        assert (before.entries.cpu() != after.entries.cpu()).any()
        assert torch.equal(after.entries.cpu(), plans.make_plan(moved.to("cpu"), 2, 9, 16).entries)


def test_narrowed_rows_are_made_on_the_cpu():
    moved = make_queries(ROWS, SETS).to("cuda")
    for narrow in (lambda rows: rows.within_window(3), lambda rows: rows.within_key_sets()):
        with CpuValues(), record() as seen:
            there = plans.plan_of(narrow(moved), 2, 9, 16)
        assert seen.count("launch") == 2 and seen.count("copy") == 2 and not seen.count("wait")
        here = plans.make_plan(narrow(make_queries(ROWS, SETS)), 2, 9, 16)
        assert torch.equal(there.entries.cpu(), here.entries)
