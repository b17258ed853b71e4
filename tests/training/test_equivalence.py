"""The same samples give the same gradient however they are dealt out; a resumed run is the run."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from swim_fast.data.batch.dataset import MixtureSampler, SwimDataset
from swim_fast.options import Source
from tests.training.conftest import SEED, history, run, run_here, weights

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}


def changes(folder, start):
    """What training did to each weight, as one vector: with SGD, the gradients."""
    found = weights(folder)
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
                assert mine.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-4), key


@pytest.mark.slow
@pytest.mark.needs("deepspeed")
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


KINDS = ["tag", "tag", "plain", "image", "text", "text", "nothing", "nothing"]  # of the records of `unlike`


def test_the_seed_brings_every_contrast(unlike):
    sampler = MixtureSampler(SwimDataset([Source(path=str(unlike))], None), SEED)
    pairs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        kinds = [KINDS[number] for number in sampler]
        pairs += [(set(kinds[i : i + 2]), set(kinds[i + 2 : i + 4])) for i in (0, 4)]
    pairs += [(other, mine) for mine, other in pairs]
    assert any(mine == {"nothing"} and "tag" in other for mine, other in pairs)
    assert any(mine == {"text"} and {"tag", "image"} == other for mine, other in pairs)
    assert any("tag" in mine and "plain" in other and "tag" not in other for mine, other in pairs)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2_offload", "zero3_offload")]


@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("zero", ["zero3", *SLOW])
def test_ranks_with_unlike_batches_give_the_losses_of_one_rank(write_config, unlike, zero):
    """Text against video and image, tag against none, nothing against something; everything is trained."""
    data = {"train": [{"path": str(unlike)}], "eval": {"same": {"path": str(unlike), "limit": 3}}}
    steps = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "seed": SEED}
    one = write_config("one", data=data, training={**steps, "gradient_accumulation_steps": 2})
    run_here(one)
    deepspeed = {"deepspeed": f"configs/deepspeed/{zero}.json", "save_strategy": "steps", "save_steps": 2}
    two = write_config("two", data=data, training={**steps, **deepspeed})
    run("train", two, ranks=2)
    one, two = one.with_suffix(""), two.with_suffix("")
    for mine, other in zip(history(one), history(two), strict=True):
        for key in ("loss", "text_loss", "mask_loss", "pairs_per_step", "skipped"):
            assert mine.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-4), key
    mine, other = (json.loads((folder / "all_results.json").read_text()) for folder in (one, two))
    for key in ("loss", "text_loss", "mask_loss", "pairs"):
        assert mine[f"eval_same_{key}"] == pytest.approx(other[f"eval_same_{key}"], rel=1e-4), key
    # the final checkpoint is a plain one with the weights that were trained, the tied head among them
    mine, other = (AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32) for folder in (one, two))
    assert other.lm_head.weight is other.get_input_embeddings().weight
    for (name, value), trained in zip(mine.named_parameters(), other.parameters(), strict=True):
        assert (value - trained).norm() <= 1e-3 * max(value.norm().item(), 1), name
    saved = json.loads((two / "checkpoint-2" / "layout.json").read_text())
    layout = {"ranks": 2, "batch": 2, "accumulation": 1, "sequence_parallel": 1}
    assert saved == layout | {"zero_stage": int(zero[4]), "fsdp": False}


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
