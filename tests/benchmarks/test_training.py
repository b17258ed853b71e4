"""The benchmark of training on small clips: what it refuses to time, what it measures, what it writes."""

import dataclasses
import time

import pytest
import torch

from benchmarks.training import __main__ as training
from benchmarks.training import input as training_input
from benchmarks.training import profile as training_profile
from benchmarks.training import report as training_report
from benchmarks.training import steps as training_steps
from benchmarks.training.material import Clip, write_records
from benchmarks.training.report import Figures, record
from swim_fast.config import load_config
from swim_fast.options import Source

SMALL = (8, 112)  # frames, pixels a side


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("SWIM_FAST_CACHE", str(folder / "cache"))


@pytest.fixture
def trainer(folder):
    from swim_fast.training.run import build_trainer

    trainer = build_trainer(load_config(training_steps.prepare(folder, "tiny", *SMALL)))
    return trainer, trainer.data_collator([trainer.train_dataset[0]])


@pytest.mark.slow
def test_steps_alternate_and_know_what_they_worked_on(folder):
    steps = training_steps.run(folder, "tiny", 2, 2, *SMALL)
    assert len(steps.with_loss) == len(steps.without) == 2 and min(steps.with_loss + steps.without) > 0
    assert steps.ranks == 2 and steps.nouns >= 3 and steps.pairs == 2 * steps.nouns  # frames 0 and 4 of eight
    assert steps.tokens > 4 * 16


def test_a_step_without_the_attention_loss_is_one_of_a_stock_model(folder, monkeypatch):
    """Every second pair of steps sends no noun queries, and makes no pairs."""
    from swim_fast.training import trainer as module

    seen, compute = [], module.compute_losses

    def watched(model, batch, loss, group):
        losses = compute(model, batch, loss, group)
        seen.append((loss is not None, losses.outputs.attentions is not None))
        return losses

    monkeypatch.setattr(module, "compute_losses", watched)
    config = load_config(training_steps.prepare(folder, "tiny", *SMALL))
    training_steps.measure(config, rounds=2)
    assert seen == [(kind, kind) for kind in (True, False, False, True, True, False)]


def test_nothing_is_timed_unless_the_losses_agree(trainer, monkeypatch):
    from swim_fast.training import step as module

    right = module.compute_pair_losses
    trainer, batch = trainer
    training_steps.assert_same_losses(trainer, batch)

    def wrong(predictions, *choices):
        return right(predictions, *choices) * (1.01 if predictions.backend != "eager" else 1)

    monkeypatch.setattr(module, "compute_pair_losses", wrong)
    with pytest.raises(AssertionError, match="mask loss"):
        training_steps.assert_same_losses(trainer, batch)
    assert trainer.model.training  # as it was, also after an error


def test_steps_stay_on_the_cpu_of_a_machine_with_gpus(folder, monkeypatch):
    from swim_fast.training.run import _get_machine_settings, _refuse_data_parallel

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    config = load_config(training_steps.prepare(folder, "tiny", *SMALL))
    _refuse_data_parallel(config)
    assert config.training["use_cpu"] and _get_machine_settings(config)["dataloader_pin_memory"] is False


def test_padding(folder):
    clips = [Clip(frames, 112, 112) for frames in (2, 4, 8, 16)]
    found = training_input.measure_padding(folder, clips, pack_tokens=1024)
    assert found.packed == 1 and found.padded > found.packed and found.room >= 1
    assert found.samples == 4 * len(training_input.ANSWERS) * 6 // 5 and found.longest <= 1024


def test_loading(folder):
    found = training_input.measure_loading(folder, "small", [Clip(8, 112, 112), Clip(16, 112, 112)], 4, rounds=1)
    assert found.samples == 4 and found.frames == 2 * 8 + 2 * 16
    assert len(found.everything) == len(found.decoding) == len(found.common) == 1
    assert found.share() == pytest.approx(found.decoding[0] / found.everything[0])


def test_profile_adds_up(folder, monkeypatch):
    """The parts are disjoint and make up the whole; nothing stays watched."""
    from swim_fast.data.source.masks import Mask

    decode = Mask.decode
    began = time.perf_counter()
    found = training_profile.measure_profile(folder, "profiled", [Clip(8, 112, 112), Clip(16, 112, 112)], 4, rounds=2)
    passed = time.perf_counter() - began
    assert found.samples == 4 and found.decoded == 12 * 3 * 112 * 112
    assert list(found.parts) == list(training_profile.PARTS)
    assert all(len(values) == 2 and min(values) > 0 for values in found.parts.values())
    assert found.samples * sum(map(sum, found.parts.values())) < passed
    assert Mask.decode is decode


def test_a_part_within_another_counts_for_itself_alone(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 7.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = training_profile.Stopwatch()
    with watch.part("outer"):
        with watch.part("inner"):
            pass
    with watch.part("inner"):
        pass
    assert watch.seconds == {"outer": 5.0, "inner": 3.0}


def test_collation(folder):
    found = training_input.measure_collation(folder, Clip(8, 112, 140, 4), rounds=2)
    assert found.tokens > 4 * 20 and found.pairs >= 2 * 3  # three nouns, two annotated patches
    assert all(len(getattr(found, name)) == 2 for name in ("processor", "building"))
    assert all(len(getattr(found, name)) == 10 for name in ("padded", "packed"))


def test_collation_does_not_copy_a_single_sample(folder):
    """What makes the target: the frames of a long video are tens of megabytes."""
    from swim_fast.data.batch.collation import Collator
    from swim_fast.data.batch.dataset import SwimDataset
    from swim_fast.data.sample.builder import SampleBuilder

    processor = training_input.processor_of(folder / "tiny")
    path = write_records(folder / "one.jsonl", [Clip(4, 112, 112)])
    sample = SwimDataset([Source(path=str(path))], SampleBuilder(processor))[0]
    frames, collate = sample.inputs["pixel_values_videos"], Collator(processor, frames=True)
    assert collate([sample])["pixel_values_videos"] is frames
    assert torch.equal(collate([sample, sample])["pixel_values_videos"].data, torch.cat([frames.data, frames.data]))


STEPS = training_steps.Steps([1.03, 1.04, 9.0], [1.0, 1.0, 1.1], 4136, 8, 1, 900_000, 2, 1)


def test_report(tmp_path):
    file = training_report.open_records(tmp_path)
    file.put(*training_report.step_records("tiny", STEPS))
    slow = dataclasses.replace(STEPS, with_loss=[1.01, 1.01, 1.02])
    file.put(*training_report.step_records("tiny", slow))  # in their place
    padding = training_input.Padding(10, 40, 400, 1.9, 1.0, 1.06, 4, 3)
    loading = training_input.Loading("720p", 12, 384, [4.0], [3.0], [9.0], 0.3)
    collation = training_input.Collation(17_960, 16, [1.9], [2.2], [0.0008], [0.02])
    file.put(*training_report.padding_records(padding), *training_report.loading_records(loading))
    file.put(*training_report.collation_records(collation))
    parts = {part: [0.1] for part in training_profile.PARTS}
    profile = training_profile.Profile("720p", 12, 88_000_000, parts)
    file.put(*training_report.profile_records(profile))
    training_report.draw(tmp_path)
    records = training_report.open_records(tmp_path).records.values()
    assert len(records) == 2 + 3 + 3 + 4 + len(training_profile.PARTS)
    found = {
        target.name.split(":")[0]: (round(target.value, 3), target.met)
        for target in training_report.compute_targets(Figures(records))
    }
    assert found == {
        "attention loss, of a step": (0.01, True),
        "slots per token": (1.06, False),  # the last of two: packed is met
        "loader, of decoding alone": (0.75, False),
        "loader, of the common path": (2.25, False),
        "collation, padded": (0.8, True),
        "collation, packed": (20.0, False),
    }
    text = (tmp_path / "training.md").read_text()
    assert "| tiny, 2 ranks | 1.010 s | 1.000 s | 1.0% |" in text and text.count("**not met**") == 4
    assert "0.9 M parameters, float32, 4,136 tokens" in text
    assert f"| resizing | 100.0 ms | {1 / len(parts):.1%} |" in text
    assert "would reach 0.40 of decoding alone (wanted: 0.85); decoding alone is 3.00 times" in text  # 2 of 2 + 3 parts


def test_median_and_extremes():
    found = record("step", "a", "b", [3.0, 1.0, 2.0, 10.0], "s", "")
    assert (found.value, found.lowest, found.highest, found.rounds) == (2.5, 1.0, 10.0, 4)


def test_parts_are_chosen(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(training, "measure", lambda parts, folder, output: measured.append(parts))
    monkeypatch.setattr(training_report, "draw", lambda output: "report")
    for words, parts in ((["padding"], ["padding"]), ([], list(training.PARTS))):
        monkeypatch.setattr("sys.argv", ["training", *words, "--output", str(tmp_path)])
        training.main()
        assert measured.pop() == parts and "report" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["training", "pading"])
    with pytest.raises(SystemExit):
        training.main()
