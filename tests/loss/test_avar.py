"""AVAR's losses of questions (arXiv 2603.03825) against the paper's formula on whole attention matrices, in float64."""

import pytest
import torch

from swim_fast.loss.avar import EPSILON, compute_question_losses
from swim_kernels import NounQueries, noun_mass

LENGTH, HEADS, KEY_HEADS, SIZE = 30, 4, 2, 8
# system keys, image keys and question tokens of two samples
SAMPLES = [(range(0, 4), range(5, 17), range(20, 26)), (range(0, 2), range(2, 10), range(12, 15))]


def inputs(layers=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, LENGTH, SIZE), (2, KEY_HEADS, LENGTH, SIZE)] * layers
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return list(zip(made[::2], made[1::2], strict=True))


def by_formula(layers, which):
    """[G]: the logarithm of the mean attention of a sample's question to its keys, over heads and layers."""
    found = []
    for sample, parts in enumerate(SAMPLES):
        keys, questions = parts[1 - which], parts[2]
        logs = []
        for query, key in layers:
            scores = query[sample] @ key[sample].repeat_interleave(2, 0).mT * SIZE**-0.5
            scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
            chosen = scores.softmax(-1)[:, list(questions)][:, :, list(keys)]
            logs.append((chosen.sum((1, 2)) / (len(questions) * len(keys)) + EPSILON).log().mean())
        found.append(torch.stack(logs).mean())
    return torch.stack(found)


def by_masses(layers, backend="eager"):
    rows = [(s, t, 0, t + 1, s) for s, parts in enumerate(SAMPLES) for t in parts[2]]
    columns = torch.tensor(rows).T.unbind()
    queries = NounQueries(*columns, torch.empty(len(SAMPLES), 0).long())
    sets = torch.full((2, 2, 12), -1)
    for sample, (system, image, _) in enumerate(SAMPLES):
        for which, keys in enumerate((image, system)):
            sets[sample, which, : len(keys)] = torch.tensor(keys)
    masses = [noun_mass(query, key, queries, sets, backend=backend) for query, key in layers]
    return compute_question_losses(masses, queries.key_set, (sets >= 0).sum(-1))


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_values_and_gradients_are_those_of_the_formula(backend):
    layers = inputs()
    found, wanted = by_masses(layers, backend), torch.stack([-by_formula(layers, 0), by_formula(layers, 1)])
    torch.testing.assert_close(found, wanted)
    upstream, leaves = torch.randn(2, 2, dtype=torch.float64), [tensor for pair in layers for tensor in pair]
    for gradient, other in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(gradient, other)
        assert gradient.abs().sum() > 0


def test_samples_without_keys_and_batches_without_samples():
    mass = torch.rand(3, HEADS, 2).requires_grad_()
    losses = compute_question_losses([mass], torch.zeros(3).long(), torch.tensor([[5, 0]]))
    assert losses[1].item() == 0 and losses[0].item() > 0
    nothing = compute_question_losses([mass[:0]], torch.empty(0).long(), torch.empty(0, 2).long()).sum(1)
    assert nothing.tolist() == [0, 0] and nothing.requires_grad
