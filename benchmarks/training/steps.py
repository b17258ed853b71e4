"""Time of a whole training step with the attention loss and without it, alternated in one run of the real trainer.

Every step trains on the same sample. A step is what the trainer does between its two callbacks: forward, backward,
reduction over the ranks, clipping, optimizer. Without the attention loss the same model, attached as it is, gets no
noun queries: it is then a stock one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks.training.material import SIZES, Clip, write_checkpoint, write_records
from swim_fast.config import RunConfig, load_config
from swim_fast.options import AttentionLoss

DTYPES = {"tiny": "float32", "0.1 B": "bfloat16"}
FRAMES, SIDE = 32, 448  # 16 patches of 16 × 16 tokens: 4,096, and the text
WARM_UP = 2
ORDER = (True, False, False, True)  # with the attention loss, without, …: a drift meets both alike


@dataclasses.dataclass(frozen=True)
class Steps:
    """Seconds of the steps with the attention loss and without, in their order, and what they worked on."""

    with_loss: list[float]
    without: list[float]
    tokens: int
    pairs: int
    nouns: int  # tokens
    parameters: int
    ranks: int
    threads: int


def prepare(folder: Path, size: str, frames: int = FRAMES, side: int = SIDE) -> Path:
    """Checkpoint, clip and configuration in a folder; the path of the configuration."""
    import yaml

    checkpoint = write_checkpoint(folder / size, SIZES[size])
    records = folder / f"{frames}-{side}.jsonl"
    if not records.exists():
        write_records(records, [Clip(frames, side, side)])
    tree = {
        "model": {"path": str(checkpoint), "dtype": DTYPES[size], "liger": False},
        "data": {"train": [{"path": str(records), "weight": 64.0}], "max_frames": frames},
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,  # as the report says, on a machine with GPUs too
            "per_device_train_batch_size": 1,
            "save_strategy": "no",
            "logging_steps": 10**6,
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": DTYPES[size] == "bfloat16",
        },
    }
    path = folder / f"{size}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def steps_of(number: int) -> bool:
    """Return True for a step with the attention loss; the first ones, which warm up, are of both kinds."""
    return ORDER[number % len(ORDER)]


class _Alternate(TrainerCallback):
    """Choose the loss of every step, and keep its time."""

    def __init__(self, loss: AttentionLoss):
        self.trainer = None
        self.losses = {True: loss, False: None}
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.attention_loss = self.losses[steps_of(state.global_step)]
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._since)


def measure(config: RunConfig, rounds: int) -> Steps:
    """`rounds` steps of each kind, after those that warm up and after an agreement of the losses."""
    from swim_fast.training.run import build_trainer

    trainer = build_trainer(config.replace(training={**config.training, "max_steps": WARM_UP + 2 * rounds}))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert not batch["problems"], batch["problems"]
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert_same_losses(trainer, batch)
    alternate = _Alternate(trainer.attention_loss)
    alternate.trainer = trainer
    trainer.add_callback(alternate)
    trainer.train()
    times, queries = {True: [], False: []}, batch["noun_queries"]
    for number, seconds in enumerate(alternate.seconds[WARM_UP:], WARM_UP):
        times[steps_of(number)].append(seconds)
    return Steps(
        times[True],
        times[False],
        tokens=batch["input_ids"].numel(),
        pairs=len(batch["mask_targets"]),
        nouns=len(set(zip(queries.sequence.tolist(), queries.position.tolist(), strict=True))),
        parameters=parameters,
        ranks=trainer.args.world_size,
        threads=torch.get_num_threads(),
    )


def assert_same_losses(trainer, batch) -> None:
    """Assert that both kinds of step have the same text loss, and that the mask loss is the eager reference's.

    Raises:
        AssertionError: naming the loss.
    """
    from swim_fast.modeling import attach_noun_attention
    from swim_fast.training.step import compute_losses

    model, loss = trainer.model, trainer.attention_loss
    narrow = next(model.parameters()).dtype != torch.float32
    tolerance = 2e-2 if narrow else 1e-4
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            losses = compute_losses(model, batch, loss)
            alone = compute_losses(model, batch, None)
            attach_noun_attention(model, loss.layers, "eager", fused=False)
            reference = compute_losses(model, batch, loss.replace(backend="eager"))
    finally:
        attach_noun_attention(model, loss.layers, loss.backend, loss.fused)
        model.train()
    assert losses.mask > 0, "the sample has no mask to look at"
    torch.testing.assert_close(losses.text, alone.text, rtol=tolerance, atol=0, msg=lambda m: f"text loss: {m}")
    torch.testing.assert_close(losses.mask, reference.mask, rtol=tolerance, atol=0, msg=lambda m: f"mask loss: {m}")


def run(folder: Path, size: str, ranks: int, rounds: int, frames: int = FRAMES, side: int = SIDE) -> Steps:
    """`measure` in processes of their own, which share the cores."""
    root = Path(__file__).parents[2]
    config, result = prepare(folder, size, frames, side), folder / "steps.json"
    threads = max(1, (os.cpu_count() or 1) // ranks)
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "benchmarks.training.steps", str(config), str(rounds), str(result)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"a run with {ranks} ranks failed:\n{done.stderr[-4000:]}")
    return Steps(**json.loads(result.read_text(encoding="utf-8")))


def main(config: str, rounds: str, result: str) -> None:
    """A rank of `run`; the first one writes the result."""
    logging.basicConfig(level=logging.ERROR)
    steps = measure(load_config(config), int(rounds))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(result).write_text(json.dumps(dataclasses.asdict(steps)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
