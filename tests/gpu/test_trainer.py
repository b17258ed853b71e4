"""Twenty training steps on the device of `--device`: losses beside the CPU's, and on a GPU where the host waits.

Clips are folders of frames, so that no decoder is needed.
"""

from __future__ import annotations

import itertools
import json
import math
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import TrainerCallback

import swim_fast
import swim_kernels
from swim_fast.config import load_config
from swim_fast.demo.tiny_model import ModelSize, build_checkpoint

pytestmark = pytest.mark.slow  # a part of `make gpu-check`
STEPS, WATCHED = {"cpu": 4, "cuda": 20}, range(10, 14)
HEIGHT, WIDTH, FRAMES = 56, 84, 6
SIZE = ModelSize(hidden_size=128, num_layers=2, num_heads=2, num_key_value_heads=1)  # a head size of 64
TEXTS = ["What does the square do?", "The square moves to the right.", "then on"]

OURS = tuple(str(Path(package.__file__).parent) for package in (swim_fast, swim_kernels))
# between those who wait and the warning
BETWEEN = (str(Path(torch.__file__).parent), warnings.__file__, str(Path(__file__).parents[1] / "helpers"))
# Functions of ours in which a step may wait for the GPU, `file:function`; waits of transformers are not ours.
ALLOWED_WAITS = {"nonfinite.py:_count_ranks"}  # once a step: the guard stops before the optimizer's step


def encode_rle(mask: np.ndarray) -> dict:
    """COCO's uncompressed RLE of a mask [H, W]."""
    flat = mask.T.flatten().tolist()
    runs = [len(list(run)) for _, run in itertools.groupby(flat)]
    return {"size": list(mask.shape), "counts": [0] * flat[0] + runs}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Checkpoint and records: a bright square that moves to the right, answers of three lengths."""
    folder = tmp_path_factory.mktemp("material")
    checkpoint = build_checkpoint(folder / "checkpoint", TEXTS * 3, seed=0, vocab_size=300, size=SIZE)
    lines = []
    for clip in range(6):
        noise = np.random.default_rng(clip).integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        annotation = {}
        (folder / str(clip)).mkdir()
        for t in range(FRAMES):
            mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            mask[10 + clip : 40, 4 + 8 * t : 32 + 8 * t] = 1
            frame = np.where(mask[..., None] > 0, 240, noise).astype(np.uint8)
            Image.fromarray(frame).save(folder / str(clip) / f"{t:03}.png")
            if t % 2 == 0:
                annotation[str(t)] = {"segmentation": encode_rle(mask)}
        question = {"from": "human", "value": "<video>\nWhat does the <ins>square</ins> do?"}
        answer = {"from": "gpt", "value": "The square moves to the right." + " then on" * (clip % 3)}
        lines.append({"video": str(clip), "conversations": [question, answer], "annotation": [annotation]})
    records = folder / "train.jsonl"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return checkpoint, records


@pytest.fixture
def train(material, tmp_path, monkeypatch):
    """train(name, on_cpu, callbacks, section={…}): losses of every step of a run."""
    from swim_fast.training.run import build_trainer

    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the patch embedding
    checkpoint, records = material

    def run(name, steps, on_cpu, callbacks=(), **sections):
        tree = {
            "model": {"path": str(checkpoint), "freeze": [], "liger": False, "dtype": "float32"},
            "data": {"train": [{"path": str(records)}], "max_frames": 4},
            "attention_loss": {"layers": [0, 1], "text_weight": 1.0},
            "training": {
                "output_dir": str(tmp_path / name),
                "per_device_train_batch_size": 2,
                "learning_rate": 0.02,
                "optim": "sgd",  # Adam's first steps blow up the noise of small gradients
                "max_steps": steps,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "seed": 3,
            },
        }
        if on_cpu:
            tree["training"] |= {"use_cpu": True, "dataloader_pin_memory": False}
        for section, values in sections.items():
            kept = (tree[section] | values).items()
            tree[section] = {key: value for key, value in kept if value is not None}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        trainer = build_trainer(load_config(path))
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "mask_loss" in entry]
        assert trainer.model.device.type == ("cpu" if on_cpu else "cuda")
        return [(entry["loss"], entry["mask_loss"]) for entry in steps]

    return run


KINDS = {
    "fp32": {},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "packed": {
        "model": {"dtype": "bfloat16"},
        "data": {"max_tokens_per_batch": 100},
        "training": {"per_device_train_batch_size": None},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_beside_the_cpu(train, kind, device):
    steps, on_cpu = STEPS[device.type], device.type == "cpu"
    found = train("found", steps, on_cpu, **KINDS[kind])
    assert len(found) == steps and all(math.isfinite(value) for losses in found for value in losses)
    expected = train("expected", steps, True, **KINDS[kind])
    tolerance = 1e-3 if kind == "fp32" else 3e-2
    for number, (losses, truth) in enumerate(zip(found, expected, strict=True)):
        # runs drift apart, the more so in 16 bits
        assert losses == pytest.approx(truth, rel=tolerance * (1 + number / 5)), f"step {number}"


class WatchWaits(TrainerCallback):
    """Collects the stacks at which steps wait for the GPU, as torch warns of them."""

    def __init__(self):
        self.stacks: list[list[traceback.FrameSummary]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step not in WATCHED:
            return
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step - 1 in WATCHED:
            torch.cuda.set_sync_debug_mode("default")
            self._filters.__exit__(None, None, None)

    def _note(self, message, category, filename, lineno, file=None, line=None):
        if "synchroniz" in str(message):
            self.stacks.append(traceback.extract_stack()[:-1])

    def places(self) -> Counter[tuple[str, str, int]]:
        """Count the waits by file, function and line of the innermost frame outside of torch."""
        outside = ([frame for frame in stack if not frame.filename.startswith(BETWEEN)] for stack in self.stacks)
        return Counter((frames[-1].filename, frames[-1].name, frames[-1].lineno) for frames in outside if frames)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["bf16", "packed"])
def test_the_host_does_not_wait(train, kind):
    watch = WatchWaits()
    training = KINDS[kind].get("training", {}) | {"logging_steps": 1000}
    train("watched", 16, False, [watch], **KINDS[kind] | {"training": training})
    unknown = []
    for (file, function, line), count in watch.places().most_common():
        print(f"{count} waits in {len(WATCHED)} steps: {file}:{line} {function}")
        allowed = f"{Path(file).name}:{function}" in ALLOWED_WAITS
        if file.startswith(OURS) and not allowed:
            unknown.append(f"{Path(file).name}:{line} {function}")
    assert not unknown, f"{len(unknown)} places of ours wait for the GPU: {'; '.join(unknown)}"
