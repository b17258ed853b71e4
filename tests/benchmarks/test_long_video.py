"""The simulation of long videos: its bytes against those of a run, its report against the committed one."""

import dataclasses
import json

import pytest

from benchmarks import long_video
from benchmarks.long_video import H100, Model, count_exchanges, list_ranks, simulate, transfer_seconds
from tests.training.conftest import launch, run_command


@pytest.mark.parametrize("ranks", [2, 4])  # with four, each key head is on two
def test_bytes_of_the_exchanges_are_those_of_a_run(tmp_path, ranks):
    run_command([*launch(ranks), "-m", "tests.benchmarks.exchange_ranks", str(tmp_path / "bytes.json")])
    (plain, of_plain), (checkpointed, of_checkpointed) = json.loads((tmp_path / "bytes.json").read_text())
    assert plain == of_plain and checkpointed == of_checkpointed
    assert checkpointed["all_to_all"] > plain["all_to_all"] > 0


def test_bytes_by_hand():
    """7B in bf16, 128 k tokens among four: 235 MB of queries, 67 of keys and values, 235 of outputs, a layer."""
    geometry = Model.build("Qwen2.5-VL-7B").geometry
    sent = count_exchanges(geometry, 4, tokens=2**17, encoded=64 * 512, held=2**15)
    assert sent["all_to_all"] == 3 * 28 * (2 * 234_881_024 + 67_108_864) + 2 * 64 * 512 * 3584 * 2


def test_transfers_within_a_node_and_between_two():
    near, far = transfer_seconds(H100, 8e9, 8), transfer_seconds(H100, 16e9, 16)
    assert near == 7e9 / H100.nvlink and far == 8e9 / H100.infiniband
    one_domain = dataclasses.replace(H100, node=72)
    assert transfer_seconds(one_domain, 16e9, 16) == 15e9 / H100.nvlink


def test_steps_are_divided():
    model = Model.build("Qwen2.5-VL-7B")
    one, four = (simulate(model, 2**17, ranks) for ranks in (1, 4))
    assert four.products == pytest.approx(one.products / 4) and four.attention == pytest.approx(one.attention / 4)
    assert one.exchanges == 0 and four.exchanges > 0 and one.attention_loss / 4 < four.attention_loss
    parts = [getattr(four, field.name) for field in dataclasses.fields(four) if field.name != "memory"]
    assert four.seconds == pytest.approx(sum(parts))


def test_causal_attention_by_hand():
    """Forward twice and two and a half times backward, of 4 · 3584 operations a pair and layer."""
    forward = 28 * 4 * 3584 * 2**17 * (2**17 + 1) / 2
    found = simulate(Model.build("Qwen2.5-VL-7B"), 2**17, 2).attention
    assert found == pytest.approx(forward * (2 / 0.38 + 2.5 / 0.33) / (2 * 989.4e12))


def test_ranks_of_the_models():
    assert list_ranks("Qwen2.5-VL-7B") == [1, 2, 4] and list_ranks("Qwen2.5-VL-3B") == [1, 2, 4, 8, 16]


def test_committed_report_is_what_is_computed():
    assert long_video.draw_text() == (long_video.HERE / "long_video.md").read_text(encoding="utf-8")
