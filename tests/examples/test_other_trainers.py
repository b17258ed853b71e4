"""The trainers of the examples give the losses and weights of `swim-fast train` on the same samples."""

import json
import subprocess
import sys
from ast import literal_eval

import pytest
import torch
import yaml

from swim_fast.demo.clips import write_demo_data
from swim_fast.demo.texts import all_texts
from swim_fast.demo.tiny_model import build_checkpoint
from tests.examples.test_examples import ROOT, load
from tests.training.conftest import environment, history, run_here, weights

STEPS = 5  # of 12 samples: the last ends before the epoch does
ROUNDING = 1e-5  # relative, of losses in fp32


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Returns a function that trains as the examples do on the clips and from the checkpoint of a folder.

    The clips and the checkpoint follow from the seed of the examples, so that it trains once.
    """
    found = {}

    def train(folder):
        if not found:
            output = tmp_path_factory.mktemp("ours")
            tree = {
                "model": {"path": str(folder / "start"), "freeze": []},
                "data": {"train": [{"path": str(folder / "data/train.jsonl")}], "max_frames": 4},
                "attention_loss": {"layers": [1, 2], "criterion": "kl", "text_weight": 1.0},
                "training": {
                    "output_dir": str(output / "run"),
                    "per_device_train_batch_size": 12,
                    "max_steps": STEPS,
                    "learning_rate": 4e-3,
                    "lr_scheduler_type": "constant",
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": "none",
                    "seed": 42,
                    "use_cpu": True,
                },
            }
            (output / "run.yaml").write_text(yaml.safe_dump(tree))
            run_here(output / "run.yaml")
            found.update(steps=history(output / "run"), weights=weights(output / "run"))
        return found

    return train


def check(folder, steps, ours, rounding=ROUNDING):
    """Compare the losses of every step, and what the steps did to the weights."""
    from transformers import AutoModelForImageTextToText

    assert len(steps) == len(ours["steps"]) == STEPS
    for theirs, our in zip(steps, ours["steps"], strict=True):
        for key in ("text_loss", "mask_loss"):
            assert theirs[key] == pytest.approx(our[key], rel=rounding), key
    assert steps[-1]["text_loss"] < steps[0]["text_loss"] / 3
    start, trained = weights(folder / "start"), weights(folder / "trained")
    assert trained.keys() == start.keys()  # nothing of ours is in the checkpoint
    moved = torch.cat([(trained[name] - value).flatten() for name, value in start.items()])
    meant = torch.cat([(ours["weights"][name] - value).flatten() for name, value in start.items()])
    assert (moved - meant).norm() <= 1e-4 * meant.norm()
    AutoModelForImageTextToText.from_pretrained(folder / "trained")


def launch(name, folder, ranks):
    """Run an example on several ranks and return what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    options = ["--folder", str(folder), "--steps", str(STEPS), "--batch-size", str(6 // ranks)]
    command = [*launcher, f"examples/{name}.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def test_own_training_loop(tmp_path, ours):
    steps = load("own_training_loop").main(tmp_path, STEPS)
    check(tmp_path, steps, ours(tmp_path))


def test_own_training_loop_on_two_ranks(tmp_path, ours):
    lines = [line.split() for line in launch("own_training_loop", tmp_path, 2).splitlines() if line.startswith("step")]
    steps = [{"text_loss": float(line[4]), "mask_loss": float(line[7])} for line in lines]  # by rank 0 alone
    check(tmp_path, steps, ours(tmp_path), rounding=1e-3)  # as printed


@pytest.mark.needs("trl")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # which TRL sets
def test_trl_trainer(tmp_path, ours):
    steps = load("trl_trainer").main(tmp_path, STEPS)
    check(tmp_path, steps, ours(tmp_path))


@pytest.mark.slow
@pytest.mark.needs("trl")
def test_trl_trainer_on_two_ranks(tmp_path, ours):
    lines = [line for line in launch("trl_trainer", tmp_path, 2).splitlines() if "mask_loss" in line]
    steps = [{key: float(value) for key, value in literal_eval(line[line.index("{") :]).items()} for line in lines]
    check(tmp_path, steps, ours(tmp_path), rounding=1e-3)  # as printed


def write_start(folder):
    """Write the clips and the checkpoint of the other examples for one that takes them from elsewhere."""
    write_demo_data(folder / "data", seed=0, train_clips=24, heldout_clips=1, workers=1)
    build_checkpoint(folder / "start", all_texts(), seed=0)


def run_with_records(folder, *command):
    """Run a Python command that finds the records in its environment."""
    about = {"RECORDS": str(folder / "data/train.jsonl"), "DISABLE_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment() | about,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


OPTIONS = {  # of trainers that take those of transformers
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "seed": 42,
}


@pytest.mark.slow
@pytest.mark.needs("swift")
def test_ms_swift_plugin(tmp_path, ours):
    """Needs ms-swift, in an environment of its own: its peft is older than that of the tests."""
    write_start(tmp_path)
    options = OPTIONS | {
        "external_plugins": "examples/ms_swift_plugin.py",
        "model": tmp_path / "start",
        "model_type": "qwen2_5_vl",
        "template": "swim",
        "dataset": "swim",
        "split_dataset_ratio": 0,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "tuner_type": "full",
        "freeze_vit": False,
        "freeze_aligner": False,
        "torch_dtype": "float32",
        "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
        "warmup_ratio": 0,
        "weight_decay": 0,
        "adam_beta2": 0.999,
        "use_hf": True,
        "output_dir": tmp_path,
        "add_version": False,
        "save_steps": STEPS,
        "save_only_model": True,
    }
    run_with_records(tmp_path, "-m", "swift.cli.sft", *[part for k, v in options.items() for part in (f"--{k}", v)])
    logs = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    (tmp_path / f"checkpoint-{STEPS}").rename(tmp_path / "trained")
    check(tmp_path, [log for log in logs if "mask_loss" in log], ours(tmp_path))


@pytest.mark.slow
@pytest.mark.needs("llamafactory")
def test_llama_factory(tmp_path, ours):
    """Needs llamafactory, in an environment of its own."""
    write_start(tmp_path)
    options = OPTIONS | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(tmp_path / "start"),
        "template": "qwen2_vl",
        "dataset": "records",
        "disable_shuffling": True,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "use_reentrant_gc": False,
        "use_cpu": True,
        "output_dir": str(tmp_path / "trained"),
        "save_strategy": "no",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    run_with_records(tmp_path, "examples/llama_factory.py", tmp_path / "run.yaml")
    check(tmp_path, history(tmp_path / "trained"), ours(tmp_path))
