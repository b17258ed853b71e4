"""Training on packed batches: the losses and gradients of padded ones, and a run that resumes in mid-epoch."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from swim_fast.config import ConfigError, load_config
from swim_fast.data.batch.collation import model_inputs
from swim_fast.training.arguments import build_arguments
from swim_kernels.flash_noun_attention.node import FlashNounAttention
from tests.data.conftest import box
from tests.training.conftest import history, record, run, run_here, square_clip, text_record, weights, write_records

SIZES = [(64, 96), (120, 75), (32, 64), (96, 96)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mixed(tmp_path):
    """Fourteen records: tagged clips of differing size and length, one without tag, images, text, a broken clip."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    lines = []
    for number in range(8):
        height, width = SIZES[number % 4]
        clip = folder / f"{number}.mp4"
        masks = square_clip(clip, number, count=2 + number % 5, height=height, width=width, fps=(1, 2, 4)[number % 3])
        lines.append(record(clip.name, masks, "moves to the right, " * (number % 3) + "then on"))
    lines[5] = {"video": "5.mp4", "conversations": text_record(2)["conversations"]}
    for number, (height, width) in enumerate(((60, 130), (32, 32))):
        noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        image = record(f"{number}.png", [box(height, width, 4, 30, 2, 20)])
        image["image"] = image.pop("video")
        lines.insert(3 * number + 1, image)
    lines[4:4] = [text_record(0), text_record(2)]
    lines.insert(9, {**lines[0], "video": "missing.mp4"})
    lines.append(text_record(1))
    return write_records(folder / "mixed.jsonl", lines)


def trainer_of(config, *overrides):
    from swim_fast.training.run import build_trainer

    return build_trainer(load_config(config, overrides))


@pytest.mark.parametrize("rule", ["pretraining", "library"])
def test_position_ids_by_the_rule_of_the_run(write_config, tmp_path, rule):
    """Packed and padded batches of the trainer, on a clip of 20 s: what the language model is handed."""
    masks = square_clip(tmp_path / "long.mp4", 0, fps=0.3)
    file = write_records(tmp_path / "long.jsonl", [record("long.mp4", masks)])
    seen = []
    for limit in (None, 2000):
        trainer = trainer_of(
            write_config(
                data={"train": [{"path": str(file)}], "max_tokens_per_batch": limit, "max_frames": 6},
                model={"position_ids": rule},
                training={"per_device_train_batch_size": 1},
            )
        )
        batch = next(iter(trainer.get_train_dataloader()))
        language_model = trainer.model.model.language_model
        language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"][-3:, 0]), with_kwargs=True
        )
        with torch.no_grad():
            trainer.model(**model_inputs(batch))
    types = batch["mm_token_type_ids"][0]
    padded, packed = seen
    assert torch.equal(padded[:, : len(types)], packed)
    visual = types.nonzero().flatten()
    first = packed[:, visual[0]]
    cut = rule == "pretraining" or Version(transformers.__version__) < Version("5.18")  # to whole seconds
    assert packed[0, visual[-1]] - first[0] == (2 * 2 * 6 if cut else 26)  # three patches, 6.7 s apart
    assert (packed[:, visual[-1] + 1] - first).tolist() == [25 if rule == "pretraining" else 3] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("softmax", ["frame", "visual", "causal", "full"])
def test_same_losses_and_gradients_as_padded(write_config, mixed, checkpointing, softmax, monkeypatch):
    nodes, apply = [], FlashNounAttention.apply
    monkeypatch.setattr(FlashNounAttention, "apply", lambda *args: (nodes.append(args[5].name), apply(*args))[1])
    config = write_config(
        data={"train": [{"path": str(mixed)}], "max_tokens_per_batch": 2000, "max_frames": 6},
        attention_loss={"softmax": softmax},
        training={
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    )
    trainer = trainer_of(config)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    dataset = trainer.train_dataset
    items = [dataset[number] for number in range(len(dataset))]
    found = []
    for collate in (trainer.data_collator, trainer.train_collator):
        trainer.start_interval()
        trainer.model.zero_grad()
        trainer.model.train()
        batch = trainer._prepare_inputs(collate(items))
        trainer.compute_loss(trainer.model, batch).backward()
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        found.append((vars(trainer.sums), gradients, batch["input_ids"].shape))
    # forward of both, and again where checkpointing repeats it
    assert nodes == ["torch_cpu"] * 2 * 2 * (1 + checkpointing)
    (padded_sums, padded, shape), (packed_sums, packed, (one, length)) = found
    sums, expected = dict(packed_sums), dict(padded_sums)
    assert one == 1 and sums["tokens"] == sums["token_slots"] == length == expected["tokens"] < shape.numel() / 1.2
    assert expected.pop("token_slots") == shape.numel()
    assert sums["text_loss"] > 10 and sums["mask_loss"] > 1 and sums["pairs"] > 10 and sums["skipped"] == 1
    for name, value in expected.items():
        assert float(sums[name]) == pytest.approx(float(value), rel=1e-5), name
    whole = torch.cat([gradient.flatten() for gradient in padded.values()]).norm()
    for name, value in padded.items():
        # a constant added to all keys changes no softmax: the gradient of this bias is a sum that cancels
        floor = 1e-6 * whole if name.endswith("k_proj.bias") else 1e-8 * whole
        assert (packed[name] - value).norm() <= 1e-5 * value.norm() + floor, name


def logged(folder):
    keys = ("loss", "text_loss", "mask_loss", "pairs_per_step", "grad_norm", "skipped")
    return [{key: entry.get(key) for key in keys} for entry in history(folder)]


def start_again_from(folder, step):
    """As if the run had been stopped after this step."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    (folder / "model.safetensors").unlink()


def test_a_packed_run(write_config, mixed, caplog):
    """From its configuration to a checkpoint: every sample of an epoch once, and resumed in the middle of it."""
    config = write_config(
        data={
            "train": [{"path": str(mixed)}],
            "eval": {"same": {"path": str(mixed)}},
            "max_tokens_per_batch": 120,
            "pack_look_ahead": 8,
        },
        training={
            "per_device_train_batch_size": 1,
            "max_steps": -1,
            "num_train_epochs": 2,
            "save_strategy": "steps",
            "save_steps": 3,
            "gradient_accumulation_steps": 2,
        },
    )
    with caplog.at_level("INFO"):
        run_here(config)
    (line,) = [entry.getMessage() for entry in caplog.records if entry.getMessage().startswith("packing: ")]
    batches, full = int(line.split()[1]), float(line.split()[-3])
    assert "batches of up to 120 tokens per rank and epoch" in line and 60 < full <= 100
    folder = config.with_suffix("")
    losses, trained = logged(folder), weights(folder)
    steps = -(-batches // 2)
    assert len(losses) == 2 * steps > 6 and steps > 3
    assert sum(entry["skipped"] or 0 for entry in losses) == 2  # the broken clip, once an epoch
    assert {entry["padding_share"] for entry in history(folder)} == {0}
    dataset = trainer_of(config).train_dataset
    pairs = [len(item.pairs) for item in (dataset[number] for number in range(len(dataset))) if hasattr(item, "pairs")]
    for epoch in (losses[:steps], losses[steps:]):
        assert sum(entry["pairs_per_step"] for entry in epoch) == sum(pairs)

    start_again_from(folder, 3)
    run_here(config, resume=True)
    assert [entry["loss"] for entry in logged(folder)] == [entry["loss"] for entry in losses]
    assert all(torch.equal(value, weights(folder)[name]) for name, value in trained.items())


@pytest.mark.slow
def test_two_ranks_stopped_and_resumed(write_config, mixed):
    """The same losses as uninterrupted, and per step those of one rank with twice the accumulation."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    training = {
        **sgd,
        "per_device_train_batch_size": 1,
        "max_steps": 8,  # of which 6 are an epoch
        "save_strategy": "steps",
        "save_steps": 4,
        "dataloader_num_workers": 2,
    }
    data = {"train": [{"path": str(mixed)}], "max_tokens_per_batch": 120}
    config = write_config("two", data=data, training=training)
    output = run("train", config, ranks=2)
    assert output.count("packing: ") == output.count("have no length") == 1  # one rank measures, one says so
    folder = config.with_suffix("")
    losses = logged(folder)
    skipped = [path.read_text() for path in folder.glob("skipped-rank*.jsonl")]
    assert len("".join(skipped).splitlines()) == sum(entry["skipped"] or 0 for entry in losses) >= 1
    start_again_from(folder, 4)
    run("train", config, "--resume", ranks=2)
    assert [entry["loss"] for entry in logged(folder)] == [entry["loss"] for entry in losses]
    assert len({entry["loss"] for entry in losses}) == 8

    one = write_config("one", data=data, training={**training, "gradient_accumulation_steps": 2, "max_steps": 2})
    run_here(one)
    for mine, other in zip(logged(one.with_suffix("")), losses, strict=False):
        for key in ("loss", "text_loss", "mask_loss", "pairs_per_step", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4), key


def test_mistakes_are_named(write_config):
    def config(data, **training):
        training = {"per_device_train_batch_size": 1, **training}
        return load_config(write_config(data=data, training=training))

    with pytest.raises(ConfigError, match="per_device_train_batch_size counts samples, .* packs as many"):
        config({"max_tokens_per_batch": 50}, per_device_train_batch_size=2)
    with pytest.raises(ConfigError, match="data.max_tokens 60 is above data.max_tokens_per_batch 50"):
        config({"max_tokens_per_batch": 50, "max_tokens": 60})
    with pytest.raises(ConfigError, match="data.max_tokens_per_batch is 0; it must be positive"):
        config({"max_tokens_per_batch": 0})
    with pytest.raises(ConfigError, match="data.pack_look_ahead is 0; it must be positive"):
        config({"pack_look_ahead": 0})
    packed = config({"max_tokens_per_batch": 50})
    assert packed.sampling.max_tokens == 50
    assert config({"max_tokens_per_batch": 50, "max_tokens": 40}).sampling.max_tokens == 40
    assert build_arguments(packed.replace(training={})).per_device_train_batch_size == 1
