"""Configurations that the table can choose, built ahead of time: they must fit on the chip, and be built well.

What holds for every one: shared and tensor memory within what a block can have, no spills on sm_90 up to head_dim 128
and blocks of 8 rows (but for fp32), the widest tensor-core instructions of the architecture (fp32 is
multiplied in IEEE precision, without), K loaded 16 bytes at a time.
"""

import os

import pytest
import triton

from benchmarks.kernels.configurations import ARCHITECTURES, all_configurations
from benchmarks.kernels.fixed_builds import fixed_builds
from benchmarks.kernels.records import build_all

EVERYTHING = list(all_configurations())
# What a model of 28 query and 4 key heads of 128 launches on an H100 in bf16, fresh gradients alone: groups of 7,
# filled up to 8. And, of all others, some; all of the rest is slow.
CENTRAL = list(all_configurations((90,), dtypes=("bf16",), head_dims=(128,), block_heads=(8,)))
CENTRAL = [c for c in CENTRAL if not c.add and (c.readout == "mean" or not c.over_set)]
CHOSEN = list(dict.fromkeys([*CENTRAL, *EVERYTHING[::1009]]))
OTHERS = [configuration for configuration in EVERYTHING if configuration not in CHOSEN]


def complaints_of(result):
    """Return the complaints; not that triton 3.6 spills some registers of maps of each head and of masses on sm_90."""
    known = triton.__version__.startswith("3.6.") and result.configuration.readout != "mean"
    return [text for text in result.complaints() if not (known and text.startswith("spills"))]


def _results(configurations):
    return {result.configuration: result for result in build_all(configurations, workers=os.cpu_count() or 1)}


@pytest.fixture(scope="module")
def chosen():
    return _results(CHOSEN)


@pytest.fixture(scope="module")
def others():
    return _results(OTHERS)


@pytest.mark.parametrize("configuration", CHOSEN, ids=lambda configuration: configuration.name)
def test_build(configuration, chosen):
    assert complaints_of(chosen[configuration]) == []


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("configuration", OTHERS, ids=lambda configuration: configuration.name)
def test_build_of_the_rest(configuration, others):
    assert complaints_of(others[configuration]) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fixed", list(fixed_builds()), ids=lambda fixed: f"{fixed.op}-{fixed.name}")
def test_fixed_build(fixed, architecture):
    assert fixed.complaints(fixed.build(architecture)) == []
