"""The same samples give the same gradient however they are dealt out; a resumed run is the run."""

import shutil

import pytest
import torch

from tests.training.conftest import history, run, run_here, weights

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}


def changes(folder, start):
    """What training did to each weight, as one vector: with SGD, the gradients."""
    found = weights(folder)  # DeepSpeed writes the tied head a second time
    return torch.cat([(found[name] - value).flatten() for name, value in start.items()])


@pytest.fixture(scope="module")
def start(checkpoint):
    return weights(checkpoint)


def dealt(write_config, name, ranks=1, **training):
    config = write_config(name, training={**SGD, "max_steps": 2, **training})
    run("train", config, ranks=ranks) if ranks > 1 else run_here(config)
    return config.with_suffix("")


def test_batch_accumulation_and_ranks_give_one_gradient(write_config, start):
    """Samples differ in labels and pairs, and some have none: means of means would differ by tens of per cent."""
    whole = dealt(write_config, "whole", per_device_train_batch_size=4)
    accumulated = dealt(write_config, "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    ranks = dealt(write_config, "ranks", per_device_train_batch_size=2, ranks=2)
    truth = changes(whole, start)
    for folder in (accumulated, ranks):
        assert (changes(folder, start) - truth).norm() <= 1e-4 * truth.norm()
        for mine, other in zip(history(whole), history(folder), strict=True):
            for key in ("loss", "text_loss", "mask_loss", "pointing_accuracy", "pairs_per_step", "grad_norm"):
                assert mine.get(key) == pytest.approx(other.get(key), rel=1e-4), key


def test_deepspeed_zero2_equals_one_rank_with_twice_the_accumulation(write_config, start):
    adam = {"learning_rate": 1e-3, "max_steps": 3, "optim": "adamw_torch"}
    one = write_config("one", training={**adam, "gradient_accumulation_steps": 2})
    run_here(one)
    two = write_config("two", training={**adam, "deepspeed": "configs/deepspeed/zero2.json"})
    run("train", two, ranks=2)
    one, two = one.with_suffix(""), two.with_suffix("")
    for mine, other in zip(history(one), history(two), strict=True):
        for key in ("loss", "text_loss", "mask_loss", "pairs_per_step"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4), key
    truth = changes(one, start)
    assert (changes(two, start) - truth).norm() <= 1e-3 * truth.norm()


def test_resume_continues_exactly(write_config):
    """Through the middle of an epoch, into the next; same losses and same weights as the uninterrupted run."""
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    config = write_config("run", training=steps)
    run_here(config)
    folder = config.with_suffix("")
    whole, losses = weights(folder), history(folder)
    shutil.rmtree(folder / "checkpoint-6")  # as if it had been stopped after step 3
    (folder / "model.safetensors").unlink()
    run_here(config, resume=True)
    resumed = history(folder)
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4, 5, 6]
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in losses]
    assert len({entry["loss"] for entry in losses}) == 6
    for name, value in whole.items():
        assert torch.equal(value, weights(folder)[name]), name


def test_activations_on_the_host_give_the_same_weights(write_config, monkeypatch):
    from swim_fast.modeling import offload

    training = {"gradient_checkpointing": True}
    run_here(write_config("device", training=training))
    gone = []
    to_host = offload.to_host
    monkeypatch.setattr(offload, "SMALLEST", 0)
    monkeypatch.setattr(offload, "to_host", lambda tensor: gone.append(to_host(tensor)) or gone[-1])
    host = write_config("host", training=training, model={"activation_offload": True})
    run_here(host)
    assert sum(isinstance(kept, offload.OnHost) for kept in gone) >= 2 * 2  # of each layer, in each step
    found = weights(host.with_suffix(""))
    assert all(torch.equal(value, found[name]) for name, value in weights(host.with_name("device")).items())
