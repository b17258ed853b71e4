"""Fixtures of the builder's tests."""

import pytest

from tests.data.conftest import builder_of
from tests.data.sample.samples import H, W


@pytest.fixture(scope="module")
def build(processor):
    """build(record, **options), by default with a causal softmax: one row for each token of a noun."""
    builders = {}

    def make(record, **options):
        options = {"softmax": "causal"} | options
        key = tuple(sorted(options.items()))
        if key not in builders:
            builders[key] = builder_of(processor, **options)
        return builders[key](record)

    yield make
    for builder in builders.values():
        builder.reader.close()


@pytest.fixture
def video(make_record, clip):
    """video(*turns, objects=(), count=12, fps=4): a record of a clip."""

    def make(*turns, objects=(), count=12, fps=4, **options):
        return make_record(*turns, kind="video", media=clip(count, fps, H, W), objects=objects, **options)

    return make
