"""Blocks of the vocabulary against all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import count_allocations, watch_saved
from swim_fast.modeling.linear_cross_entropy import linear_cross_entropy_sum
from tests.kernels.budget import assert_within_budget

NAMES = ("loss", "∂hidden", "∂weight", "∂bias")


def inputs(seed, tokens=37, width=24, vocabulary=101, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    offset = torch.randn(vocabulary, generator=generator) if bias else None
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    leaves = [t if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, offset)]
    return *leaves, targets, torch.randn((), generator=generator)


def plain(hidden, weight, bias, targets):
    logits = F.linear(hidden, weight, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum")


def blocks(size):
    return lambda hidden, weight, bias, targets: linear_cross_entropy_sum(hidden, weight, targets, bias, size)


def results(function, hidden, weight, bias, targets, upstream, dtype=None):
    leaves = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight, bias)]
    loss = function(*leaves, targets)
    present = [leaf for leaf in leaves if leaf is not None]
    return loss.detach(), *torch.autograd.grad(loss, present, upstream.to(loss.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 37 * 10, 37 * 50 + 3, 2**25])  # blocks of 1, 10, 50 and all 101 words
def test_value_and_gradients(dtype, bias, size):
    samples = []
    for seed in range(3):
        given = inputs(seed, bias=bias, dtype=dtype)
        exact = results(plain, *given, dtype=torch.float64)
        samples.append((results(blocks(size), *given), results(plain, *given), exact))
    assert samples[0][0][0].dtype == torch.float32
    assert_within_budget(samples, NAMES[: 4 if bias else 3])


def test_autocast_computes_as_linear_does():
    samples = []
    for seed in range(3):
        given = inputs(seed)
        exact = results(plain, *given, dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            samples.append((results(blocks(37 * 10), *given), results(plain, *given), exact))
    mine, _, exact = samples[0]
    assert (mine[1] - exact[1]).abs().max() > 1e-4  # it was bf16
    assert_within_budget(samples, NAMES)


def test_in_double_it_is_the_formula():
    *tensors, targets, upstream = inputs(0, dtype=torch.float64)
    for mine, truth in zip(
        results(blocks(100), *tensors, targets, upstream), results(plain, *tensors, targets, upstream), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


def test_only_the_gradients_asked_for():
    hidden, weight, bias, targets, _ = inputs(0)
    weight.requires_grad_(False)
    loss = linear_cross_entropy_sum(hidden, weight, targets, bias)
    assert all(gradient is not None for gradient in torch.autograd.grad(loss, (hidden, bias)))
    assert not linear_cross_entropy_sum(hidden.detach(), weight, targets, bias.detach()).requires_grad


def test_no_token_gives_zero_with_a_graph():
    hidden, weight, bias, targets, _ = inputs(0, tokens=0)
    loss = linear_cross_entropy_sum(hidden, weight, targets, bias)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 24)
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("wrong", [-1, 101])
def test_a_target_outside_the_vocabulary_is_no_number(wrong):
    hidden, weight, bias, targets, _ = inputs(0)
    targets[3] = wrong
    assert linear_cross_entropy_sum(hidden, weight, targets, bias, 100).isnan()


def test_words_that_cannot_be_have_no_part_in_it():
    hidden, weight, bias, targets, _ = inputs(0)
    targets.clamp_(max=89)
    with torch.no_grad():
        bias[90:] = -torch.inf  # whole blocks of them
    loss = linear_cross_entropy_sum(hidden, weight, targets, bias, 37 * 4)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    expected = torch.autograd.grad(plain(hidden, weight, bias, targets), (hidden, weight, bias))
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, truth)


def test_a_weight_that_is_not_gathered_is_an_error():
    hidden, _, _, targets, _ = inputs(0)
    with pytest.raises(ValueError, match=r"weight must be \[V, H\], is \[0\]"):
        linear_cross_entropy_sum(hidden, torch.empty(0), targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_block(dtype):
    tokens, width, vocabulary, size = 300, 16, 5000, 300 * 100
    hidden, weight, _, targets, _ = inputs(0, tokens, width, vocabulary, bias=False, dtype=dtype)
    with watch_saved((hidden, weight, targets)) as saved, count_allocations() as counted:
        loss = linear_cross_entropy_sum(hidden, weight, targets, block_logits=size)
        counted.mark("forward")
        kept = saved.bytes
        loss.backward()
    logits = tokens * vocabulary * 4
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size() + hidden.numel() * 4
    assert counted.held["forward"] <= tokens * 4 + 1024  # the logarithms of the denominators
    assert kept == tokens * 4
    assert counted.peak <= gradients + 5 * size * 4 < logits
    with count_allocations() as counted:
        plain(hidden, weight, None, targets).backward()
    assert counted.peak > logits
