"""Learning rates of parts, early stopping, and the best checkpoint."""

import json
import shutil

import pytest
import torch

from swim_fast.config import load_config
from swim_fast.training.run import build_trainer
from tests.training.conftest import history, run, run_here, weights

RATES = {"vision_tower": 0.0, "merger": 0.02}


@pytest.fixture
def trainer_of(write_config):
    def make(**sections):
        return build_trainer(load_config(write_config(**sections)))

    return make


def part_of(name):
    return "merger" if ".merger." in name else "vision_tower" if ".visual." in name else None


def test_groups_are_transformers_own_divided_by_part(trainer_of):
    plain = trainer_of(training={"weight_decay": 0.1})
    trainer = trainer_of(training={"weight_decay": 0.1}, optimization={"learning_rates": RATES})
    decay = plain.get_decay_parameter_names(plain.model)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(found) == sorted(names.values())  # each once
    for group in groups:
        for name in (names[id(p)] for p in group["params"]):
            assert group["lr"] == RATES.get(part_of(name), 1e-2), name
            assert group["weight_decay"] == (0.1 if name in decay else 0.0), name
            assert group.get("part") == part_of(name)
    assert len({group["weight_decay"] for group in groups}) == 2 and groups[0]["lr"] == 1e-2
    assert trainer.create_optimizer() is trainer.optimizer and trainer.optimizer.param_groups is groups


def test_each_part_moves_at_its_rate_and_the_schedule_scales_all(write_config, checkpoint, tmp_path):
    config = write_config(
        optimization={"learning_rates": {"vision_tower": 0, "merger": 2e-2}},
        training={
            "optim": "sgd",
            "lr_scheduler_type": "linear",
            "max_steps": 4,
            "save_steps": 2,
            "save_strategy": "steps",
        },
    )
    run_here(config)
    folder = tmp_path / "run"
    moved = {name for name, value in weights(checkpoint).items() if not torch.equal(value, weights(folder)[name])}
    assert moved and not [name for name in moved if "visual" in name and "merger" not in name]
    assert any("merger" in name for name in moved)
    logs = history(folder)
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([1e-2 * (1 - t / 4) for t in range(4)])
    assert [entry["learning_rate_merger"] for entry in logs] == pytest.approx([2e-2 * (1 - t / 4) for t in range(4)])
    assert [entry["learning_rate_vision_tower"] for entry in logs] == [0, 0, 0, 0]
    whole = weights(folder)
    shutil.rmtree(folder / "checkpoint-4")
    run_here(config, resume=True)
    assert all(torch.equal(value, weights(folder)[name]) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.needs("deepspeed")
def test_deepspeed_takes_the_groups(write_config, tmp_path):
    config = write_config(
        optimization={"learning_rates": {"vision_tower": 0.0, "merger": 2e-3}},
        training={"deepspeed": "configs/deepspeed/zero2.json", "learning_rate": 1e-3, "optim": "adamw_torch"},
    )
    one = write_config(
        "one",
        optimization={"learning_rates": {"vision_tower": 0.0, "merger": 2e-3}},
        training={"learning_rate": 1e-3, "optim": "adamw_torch", "gradient_accumulation_steps": 2},
    )
    run("train", config, ranks=2)
    run_here(one)
    found, truth = weights(tmp_path / "run"), weights(tmp_path / "one")
    for name, value in truth.items():
        assert torch.allclose(found[name], value, atol=1e-4), name
    for entry in history(tmp_path / "run"):
        assert entry["learning_rate_vision_tower"] == 0
        assert entry["learning_rate_merger"] == pytest.approx(2 * entry["learning_rate"])


@pytest.fixture
def judged(write_config, records, monkeypatch):
    """judged(scores, …): configuration of a run whose evaluations, one each step, give these pointing accuracies."""

    def make(scores, name="run", **training):
        from swim_fast.training.trainer import SwimTrainer

        evaluate = SwimTrainer.evaluation_loop

        def scored(self, *arguments, metric_key_prefix="eval", **options):
            output = evaluate(self, *arguments, metric_key_prefix=metric_key_prefix, **options)
            output.metrics[f"{metric_key_prefix}_pointing_accuracy"] = scores[self.state.global_step - 1]
            return output

        monkeypatch.setattr(SwimTrainer, "evaluation_loop", scored)
        source = {"path": str(records), "limit": 1}
        return write_config(
            name,
            data={"eval": {"heldout": source, "other": source}},
            optimization={"early_stopping_patience": 2},
            training={
                "max_steps": 6,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_strategy": "steps",
                "save_steps": 1,
                "load_best_model_at_end": True,
                "metric_for_best_model": "eval_heldout_pointing_accuracy",
                **training,
            },
        )

    return make


def test_early_stop_leaves_the_best_checkpoint_and_its_metrics(judged, tmp_path, caplog):
    config = judged([0.1, 0.5, 0.4, 0.3, 0.9, 0.9])
    with caplog.at_level("WARNING"):
        run_here(config)
    assert "early stopping is disabled" not in caplog.text  # what the set without the metric would cause
    folder = tmp_path / "run"
    assert history(folder)[-1]["step"] == 4
    best, last, left = weights(folder / "checkpoint-2"), weights(folder / "checkpoint-4"), weights(folder)
    assert all(torch.equal(best[name], value) for name, value in left.items())
    assert any(not torch.equal(last[name], value) for name, value in left.items())
    results = json.loads((folder / "all_results.json").read_text())
    evaluated = [
        e for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "eval_other_loss" in e
    ]
    assert results["eval_other_loss"] == evaluated[1]["eval_other_loss"] != evaluated[3]["eval_other_loss"]
    assert results["eval_heldout_pointing_accuracy"] == 0.5
    shutil.rmtree(folder / "checkpoint-4")  # as if it had been stopped after step 3, with one evaluation to go
    run_here(config, resume=True)
    assert history(folder)[-1]["step"] == 4


@pytest.mark.needs("peft")
def test_best_checkpoint_of_adapters(judged, write_config, tmp_path):
    """Adapters are loaded where whole weights would be."""
    from safetensors.torch import load_file

    config = judged([0.1, 0.5, 0.4, 0.3, 0.9, 0.9])
    run_here(config, "model.lora={rank: 2}")
    left, best, last = (
        load_file(tmp_path / "run" / folder / "adapter_model.safetensors")
        for folder in ("adapter", "checkpoint-2", "checkpoint-4")
    )
    assert all(torch.equal(best[name], value) for name, value in left.items())
    assert any(not torch.equal(last[name], value) for name, value in left.items())
