"""What the kernels load and store, in a small size; `make kernel-report` counts the large ones."""

import pytest

from benchmarks.kernels.noun_attention_bytes import BYTES, HEAD_DIM, PHASES, measure

pytestmark = pytest.mark.interpreter
KEY_HEADS, LENGTH = 2, 1024


@pytest.fixture(scope="module", params=["causal", "patches"])
def counted(request):
    return measure(4, LENGTH, request.param, num_heads=14, num_key_heads=KEY_HEADS)


def test_forward_reads_every_needed_key_once(counted):
    traffic, floor = counted
    read = traffic["forward, lse given"].total(tensor="key", access="load")
    assert read.issued == read.unique == floor.read_out


def test_lse_reads_every_key_of_the_softmax_once(counted):
    traffic, floor = counted
    read = traffic["forward, lse computed"].total(kernel="lse_partials_kernel", tensor="key")
    assert read.issued == read.unique == floor.softmax


def test_backward_reads_the_keys_twice_and_writes_their_gradient_once(counted):
    """With a softmax over patches three times: ∂q and ∂k come from a pass each."""
    traffic, floor = counted
    read = traffic["backward"].total(tensor="key", access="load")
    passes = 2 if floor.softmax == floor.read_out else 1
    assert read.issued == floor.read_out + passes * floor.softmax <= 3 * LENGTH * KEY_HEADS * HEAD_DIM * BYTES
    assert passes == 2 or read.unique == read.issued
    written = traffic["backward"].total(tensor="grad_key", access="store")
    assert written.issued == written.unique == floor.key


def test_maps_are_written_once_and_nothing_is_filled_but_the_query_gradient(counted):
    traffic, floor = counted
    written = traffic["forward, lse given"].total(tensor="maps", access="store")
    assert written.issued == written.unique == floor.maps
    fills = [row.kernel for row in traffic["backward"].rows() if row.kernel.startswith("torch.") and row.unique > 4096]
    assert fills == ["torch.zeros_like"]


def test_added_gradients_touch_nothing_else(counted):
    """∂k read and written once where a softmax reaches, in whole tiles, no fill; of ∂q the rows' tokens."""
    traffic, floor = counted
    added = traffic["backward, added"]
    for access in ("load", "store"):
        key = added.total(tensor="grad_key", access=access)
        assert (
            key.issued == key.unique
            and floor.added <= key.issued <= floor.added + 2 * 64 * KEY_HEADS * HEAD_DIM * BYTES
        )
        assert floor.added < floor.key or key.issued == floor.key
        rows = added.total(tensor="grad_query", access=access)
        assert rows.issued == rows.unique == 4 * 14 * HEAD_DIM * BYTES
    assert not [row for row in added.rows() if row.kernel.startswith("torch.") and row.unique > 4096]


@pytest.mark.parametrize("phase", PHASES)
def test_no_phase_moves_less_than_its_floor(phase, counted):
    traffic, floor = counted
    assert sum(row.unique for row in traffic[phase].rows()) >= floor.of(phase)
