"""Peak memory of a decoder's step on each of P ranks that share a sequence: `python -m benchmarks.sequence_memory`.

On the CPU, gloo: what a forward and backward allocate beside weights and gradients, counted by torch's profiler. A text
without pictures, so that it is the language model's part alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.core import describe_machine, markdown_table

RANKS = (1, 2, 4)
RUNS = 3  # gloo's threads free what was sent when they come to it: the smallest peak is what a step needs
LABELS = 64


def measure(ranks: int, length: int, checkpointing: bool) -> int:
    """Return the peak bytes of a step of this rank, above weights and gradients."""
    import torch
    import torch.distributed as dist

    from benchmarks.memory import count_allocations
    from swim_fast.demo.tiny_model import ModelSize, build_model, train_tokenizer
    from swim_fast.modeling.prepare import prepare_model
    from swim_fast.modeling.sequence_group import SequenceGroup

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = ModelSize(hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=8, num_key_value_heads=4)
    model = build_model(train_tokenizer(["a dog and a cat"] * 4, 300), size, seed=0).train()
    model.set_attn_implementation("sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    group = SequenceGroup.of_world(ranks) if ranks > 1 else None
    prepare_model(model, frozen=["vision_tower", "merger"], layers=[], sequence_group=group)
    ids = torch.randint(20, 250, (1, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-LABELS] = -100
    inputs = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).expand(3, 1, -1)}
    inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # so that backward allocates none
    with count_allocations() as counted:
        model(**inputs, use_cache=False).loss.backward()
    dist.barrier()
    dist.destroy_process_group()
    return counted.peak


def run(ranks: int, *words: str) -> int:
    """Return the largest peak of P ranks, processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run([*launch, "-m", "benchmarks.sequence_memory", "--into", folder, *words], check=True)
        return max(json.loads(path.read_text()) for path in Path(folder).iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequence_memory", description=__doc__.split(":")[0])
    parser.add_argument("--length", type=int, default=16384, help="tokens")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.into:
        peak = measure(int(os.environ["WORLD_SIZE"]), args.length, args.checkpointing)
        (args.into / os.environ["RANK"]).write_text(json.dumps(peak))
        return
    print(f"{args.length:,} tokens, 4 layers of width 256, 8 / 4 heads, fp32, sdpa, the rank with the largest peak,")
    print(f"smallest of {RUNS} runs")
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), end="\n\n")
    rows = []
    for name, words in (("all activations kept", []), ("activation checkpointing", ["--checkpointing"])):
        words = ["--length", str(args.length), *words]
        peaks = [min(run(ranks, *words) for _ in range(RUNS if ranks > 1 else 1)) for ranks in RANKS]
        shares = [f"{peak / 1e6:.0f} MB ({peaks[0] / peak:.2f} ×)" for peak in peaks]
        rows.append((name, *shares))
    print("\n".join(markdown_table(("", *(f"P {ranks}" for ranks in RANKS)), "lrrr", rows)))


if __name__ == "__main__":
    main()
