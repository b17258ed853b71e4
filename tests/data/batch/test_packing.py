"""Packed batches: full ones, every sample once, the same number for every rank and epoch, in an order that resumes."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from swim_fast.data.batch.dataset import MixtureSampler
from swim_fast.data.batch.packing import PackingSampler, first_fit_decreasing


class Files:
    """A dataset as far as samplers look at it: sources of so many records and such weights."""

    def __init__(self, **sources):
        self.lengths = [count for count, _ in sources.values()]
        self.sources = [SimpleNamespace(weight=weight) for _, weight in sources.values()]

    def __len__(self):
        return sum(self.lengths)

    def __getitem__(self, item):
        return item


def mixture(count, seed=0):
    """Tokens of a mixture: clips of a few to hundreds of frames, images and text, at most 16,384."""
    rng = np.random.default_rng(seed)
    clips = (120 + rng.integers(1, 17, count) * rng.choice([180, 345, 660], count)).astype(np.int64)
    texts = rng.integers(20, 800, count)
    return np.minimum(np.where(rng.random(count) < 0.7, clips, texts), 16384)


def sampler(lengths, max_tokens=16384, weights=(1.0,), **options):
    share = len(lengths) // len(weights)
    files = Files(**{f"f{number}": (share, weight) for number, weight in enumerate(weights)})
    return PackingSampler(MixtureSampler(files, options.pop("seed", 0)), lengths, max_tokens, **options)


def test_first_fit_decreasing():
    assert first_fit_decreasing(np.array([5, 7, 5, 2, 4, 1, 9, 0]), 10) == [[6, 5, 7], [1, 3], [0, 2], [4]]
    assert first_fit_decreasing(np.array([30, 10]), 10) == [[0], [1]]
    assert first_fit_decreasing(np.array([], dtype=np.int64), 10) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("look_ahead", "world_size", "epochs", "weights"),
    [(1024, 1, 1, (1.0,)), (1024, 2, 3, (1.0, 1.0)), (100, 8, 2, (2.5, 0.3)), (7, 3, 3, (0.5,)), (1, 2, 1, (1.0,))],
)
def test_every_sample_comes_once_in_batches_that_fit(seed, look_ahead, world_size, epochs, weights):
    lengths = mixture(600, seed)
    lengths[::50] = 0
    options = {"look_ahead": look_ahead, "world_size": world_size, "epochs": epochs, "seed": seed, "weights": weights}
    ranks = [sampler(lengths, rank=rank, **options) for rank in range(world_size)]
    orders = []
    for epoch in range(epochs):
        for each in ranks:
            each.set_epoch(epoch)
        batches = [list(each) for each in ranks]
        assert {len(share) for share in batches} == {len(ranks[0])}
        everything = [batch for share in batches for batch in share]
        assert max(int(lengths[batch].sum()) for batch in everything) <= 16384
        expected = Counter(ranks[0].order.items(epoch).tolist())
        assert Counter(item for batch in everything for item in batch) == expected
        assert sum(not batch for batch in everything) < world_size or look_ahead < 10
        again = sampler(lengths, rank=0, **options)
        again.set_epoch(epoch)
        torch.manual_seed(epoch)  # whatever else is drawn
        assert list(again) == batches[0]
        orders.append(everything)
    assert all(a != b for number, a in enumerate(orders) for b in orders[:number])


@pytest.mark.parametrize("max_tokens", [16384, 32768, 131072])
def test_batches_are_full(max_tokens):
    """At most 1 % more room than tokens; padded batches of four samples have 85 % more."""
    lengths = mixture(6000)
    assert 1 / sampler(lengths, max_tokens, world_size=2).efficiency() <= 1.01
    batches = lengths[torch.randperm(6000, generator=torch.Generator().manual_seed(0)).numpy()].reshape(-1, 4)
    assert batches.max(1).sum() * 4 / lengths.sum() > 1.8


def test_efficiency_counts_the_room_of_all_batches():
    half = sampler(np.full(10, 6), 10, world_size=4)
    assert [len(half), half.efficiency()] == [3, 60 / 120]


def test_splits_before_it_leaves_batches_empty():
    four = [list(sampler(np.full(9, 1), 5, rank=rank, world_size=4)) for rank in range(4)]
    assert sorted(len(batch) for share in four for batch in share) == [2, 2, 2, 3]
    many = [list(sampler(np.full(3, 1), 5, rank=rank, world_size=8)) for rank in range(8)]
    assert sorted(len(batch) for share in many for batch in share) == [0] * 6 + [1, 2]


def test_the_run_may_be_given_in_batches():
    lengths = mixture(200)
    packed = sampler(lengths, world_size=2, weights=(0.6,))
    packed.set_steps(100)
    assert packed.epochs * len(packed) >= 100 > (packed.epochs - 2) * len(packed)
    counts = []
    for epoch in range(packed.epochs):
        packed.set_epoch(epoch)
        counts.append(len(list(packed)))
    assert set(counts) == {len(packed)}
    packed.set_epoch(packed.epochs)
    with pytest.raises(ValueError, match="epoch .* of a run of .* epochs"):
        list(packed)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_skips_what_was_seen(workers):
    packed = sampler(mixture(300), look_ahead=64, epochs=2)
    packed.set_epoch(1)
    loader = DataLoader(Files(f0=(300, 1.0)), batch_sampler=packed, num_workers=workers, collate_fn=list)
    whole = list(loader)
    assert len(whole) == len(loader) == len(packed) > 12
    assert list(skip_first_batches(loader, 9)) == whole[9:]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 1"):
        sampler(mixture(3), 0)
    with pytest.raises(ValueError, match="look_ahead is 0; it must be at least 1"):
        sampler(mixture(3), look_ahead=0)
    with pytest.raises(ValueError, match="3 lengths for a dataset of 2 samples"):
        sampler(mixture(3), weights=(1.0, 1.0))
