"""How often kernels are compiled: once for a model, whatever the batch."""

from collections import Counter

import pytest

from benchmarks.kernels.configurations import all_configurations
from benchmarks.kernels.fixed_builds import fixed_builds
from tests.pretend_gpu.kernel_batches import HEAD_DIM, Batches, HeadBatches, SetBatches, builds, forget_builds

BATCHES = 200
TWICE = {"gradients_kernel"}  # with a tile for up to 8 rows and one for up to 16, of groups of 7 heads
MASK_LOSS = {"fusion_kernel", "fusion_gradient_kernel", "bands_kernel", "combine_kernel", "metrics_kernel"}
RUNS = [(Batches, fused, over) for fused in (True, False) for over in ("range", "set")]
RUNS += [(HeadBatches, True, "range"), (HeadBatches, False, "set"), (SetBatches, False, "range")]
RUNS += [(SetBatches, False, "set")]


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0].__name__}-{'fused' if run[1] else 'separate'}-{run[2]}")
def seen(request):
    """Builds of a run of 200 batches."""
    forget_builds()
    kind, *how = request.param
    batches = kind(*how)
    for _ in range(BATCHES):
        next(batches)
    return builds()


def test_one_build_of_a_kernel_for_all_batches_of_a_run(seen):
    counts = Counter({name: len(compiled) for name, compiled in seen.items()})
    assert counts == dict.fromkeys(seen, 1) | {name: 2 for name in TWICE & set(seen)}
    assert counts.total() - len(MASK_LOSS & set(seen)) <= 10


def describe(source):
    attributes = {path: values for path, values in source.attrs.items() if values}
    return source.fn.__name__, source.signature, source.constants, attributes


def test_ahead_of_time_builds_are_those_that_are_launched(seen):
    """What `benchmarks.kernels` builds and reports on, type by type and alignment by alignment."""
    ours = all_configurations(architectures=(90,), dtypes=("bf16",), head_dims=(HEAD_DIM,), block_heads=(8,))
    known = [configuration.source() for configuration in ours] + [build.source() for build in fixed_builds()]
    known = [describe(source) for source in known]
    for compiled in (build for kernel in seen.values() for build in kernel):
        assert describe(compiled.src) in known
