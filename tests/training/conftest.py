"""A tiny checkpoint, real clips with one moving square each, and runs of the real command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.data.conftest import box, rle
from tests.helpers.clips import write_clip

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH, FRAMES = 64, 96, 6
SEED = 104  # whose order of `unlike` brings every contrast between two ranks with batches of two
TEXTS = ["What does the square do?", "The square moves to the right.", "What is two and two? It is four."]


def square_clip(path: Path, seed: int, *, count=FRAMES, height=HEIGHT, width=WIDTH, **options) -> list:
    """Writes a clip of a bright square that moves to the right; returns the masks, uint8 [height, width] per frame."""
    noise = np.random.default_rng(seed).integers(0, 90, (height, width, 3), dtype=np.uint8)
    frames, masks = [], []
    for t in range(count):
        left = 4 + 8 * t
        mask = box(height, width, 16 + seed % 8, 48, left, left + 32)
        frames.append(np.where(mask[..., None] > 0, 240, noise).astype(np.uint8))
        masks.append(mask)
    write_clip(path, frames, **{"fps": 4, **options})
    return masks


def record(video: str, masks: list, answer: str = "moves to the right") -> dict:
    return {
        "video": video,
        "conversations": [
            {"from": "human", "value": "<video>\nWhat does the <ins>square</ins> do?"},
            {"from": "gpt", "value": f"The square {answer}."},
        ],
        "annotation": [{str(t): {"segmentation": rle(mask)} for t, mask in enumerate(masks) if t % 2 == 0}],
    }


def text_record(number: int) -> dict:
    turns = [("human", "What is two and two?"), ("gpt", "It is four. " * (1 + number % 3))]
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from swim_fast.demo.tiny_model import ModelSize, build_checkpoint

    size = ModelSize(
        hidden_size=64, intermediate_size=64, num_layers=2, vision_hidden_size=32, vision_intermediate_size=32
    )
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint"), TEXTS * 3, seed=0, vocab_size=300, size=size)


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """Eight records of differing length: six with video and tag, two of text alone."""
    folder = tmp_path_factory.mktemp("records")
    answers = ("moves", "moves to the right", "moves to the right, then on to the right")
    lines = []
    for number in range(6):
        masks = square_clip(folder / f"{number}.mp4", number)
        lines.append(record(f"{number}.mp4", masks[: 2 + number], answers[number % 3]))
    lines[3:3] = [text_record(0), text_record(1)]
    return write_records(folder / "train.jsonl", lines)


@pytest.fixture
def unlike(tmp_path):
    """Records of every kind: with tag, without, an image, text alone, and two that give no sample."""
    lines = []
    for number in range(3):
        masks = square_clip(tmp_path / f"{number}.mp4", number)
        lines.append(record(f"{number}.mp4", masks[: 4 + 2 * number]))
    lines[2] = json.loads(json.dumps({**lines[2], "annotation": []}).replace("<ins>", "").replace("</ins>", ""))
    Image.fromarray(np.full((56, 84, 3), 120, np.uint8)).save(tmp_path / "still.png")
    image = {"image": "still.png", "conversations": text_record(1)["conversations"]}
    lines.append(json.loads(json.dumps(image).replace("What is", "<image>What is")))
    return write_records(
        tmp_path / "unlike.jsonl", [*lines, text_record(0), text_record(2), *[{"conversations": []}] * 2]
    )


@pytest.fixture
def write_config(tmp_path, checkpoint, records):
    """write_config(training={…}, …): a YAML file for the tiny model; sections are merged into the defaults."""

    def write(name: str = "run", **sections) -> Path:
        tree = {
            "model": {"path": str(checkpoint), "freeze": []},
            "data": {"train": [{"path": str(records)}], "max_frames": 4},
            "attention_loss": {"layers": [0, 1], "text_weight": 1.0, "criterion": "kl"},
            "training": {
                "output_dir": str(tmp_path / name),
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "max_steps": 2,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "seed": 3,
            },
        }
        for section, values in sections.items():
            tree[section] = None if values is None else {**tree.get(section, {}), **values}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def launch(ranks: int) -> list[str]:
    """Return the words that start a program as one process or as several ranks."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(several if ranks > 1 else [])]


def command(*arguments: str, ranks: int = 1) -> list[str]:
    return [*launch(ranks), "-m", "swim_fast.cli", *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(*arguments: str, ranks: int = 1, code: int = 0) -> str:
    """Run `swim-fast …` in a process of its own (or several) and return what it printed."""
    return run_command(command(*map(str, arguments), ranks=ranks), code)


def run_command(words: list[str], code: int = 0) -> str:
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def run_here(config: Path, *overrides: str, resume: bool = False) -> None:
    """Train in this process: the same as `run("train", …)` without the seconds that a process takes to start."""
    from swim_fast.config import load_config
    from swim_fast.training.run import train

    train(load_config(config, overrides), resume=resume)


def history(folder: Path) -> list[dict]:
    """The training logs of a finished run."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "learning_rate" in entry]


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
