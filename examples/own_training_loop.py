"""SWIM's loss in a training loop of your own: accelerate and plain PyTorch, half a minute on a CPU.

    python examples/own_training_loop.py
    torchrun --nproc-per-node 2 examples/own_training_loop.py --batch-size 3    # the same losses

It renders its own clips and starts from a tiny random model. For real ones, name a file of records and a checkpoint.
"""

import argparse
import contextlib
import itertools
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from swim_fast import Collator, SampleBuilder
from swim_fast.data.batch.dataset import MixtureSampler, SwimDataset
from swim_fast.demo.clips import write_demo_data
from swim_fast.demo.texts import all_texts
from swim_fast.demo.tiny_model import build_checkpoint
from swim_fast.modeling.prepare import prepare_model, restore_model
from swim_fast.options import AttentionLoss, Sampling, Source
from swim_fast.training.step import compute_losses, count_items
from swim_fast.training.sums import Sums

LOSS = AttentionLoss(layers=[1, 2], criterion="kl", text_weight=1.0)


def main(folder: Path, steps: int, batch_size: int = 6, accumulation: int = 2) -> list[dict[str, float]]:
    """Train, save a plain checkpoint in `folder` / trained, and return losses and metrics of every step."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # else it sees no other rank on a CPU
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise SystemExit(
            "DeepSpeed steps in backward, once a micro-batch here: train with swim-fast train, or with DDP"
        )
    if accelerator.is_main_process:
        write_demo_data(folder / "data", seed=0, train_clips=24, heldout_clips=1, workers=1)
        build_checkpoint(folder / "start", all_texts(), seed=0)
    accelerator.wait_for_everyone()
    processor = AutoProcessor.from_pretrained(folder / "start")
    model = AutoModelForImageTextToText.from_pretrained(folder / "start")
    prepare_model(model, layers=LOSS.layers, ranks=accelerator.num_processes)

    # A record becomes tokens, pixels, and the rows of its tagged nouns with their masks; samples become a batch.
    build = SampleBuilder(processor, Sampling(max_frames=4), supervision=LOSS.supervision)
    samples = SwimDataset([Source(path=str(folder / "data/train.jsonl"))], build)
    order = MixtureSampler(samples, seed=42)
    loader = DataLoader(samples, batch_size, sampler=order, collate_fn=Collator(processor))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)

    found = []
    for epoch in itertools.count():
        order.set_epoch(epoch)
        batches = iter(loader)
        while len(found) < steps and (step := list(itertools.islice(batches, accumulation))):
            # Labels and pairs of all micro-batches and ranks: means of means would weigh the samples unequally.
            items = accelerator.reduce(count_items(step).to(accelerator.device), "sum")
            sums = Sums()
            for batch in step:
                last = contextlib.nullcontext() if batch is step[-1] else accelerator.no_sync(model)
                with last:
                    losses = compute_losses(model, batch, LOSS)
                    # gradients are averaged over the ranks, where the loss is a sum
                    accelerator.backward(accelerator.num_processes * losses.weigh(items, LOSS))
                sums += losses.sums
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total = Sums.from_tensor(accelerator.reduce(sums.to_tensor(accelerator.device), "sum"))
            found.append(total.average())
            about = "   ".join(f"{key.replace('_', ' ')} {found[-1][key]:.3f}" for key in ("text_loss", "mask_loss"))
            accelerator.print(f"step {len(found):3}   {about}")
        if len(found) == steps:
            break

    if accelerator.is_main_process:
        restore_model(accelerator.unwrap_model(model)).save_pretrained(folder / "trained")  # a plain checkpoint
        processor.save_pretrained(folder / "trained")
    accelerator.end_training()
    return found


if __name__ == "__main__":  # the clips are rendered by processes that import this file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/own_training_loop"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=6, help="samples of a micro-batch on each rank")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    main(**vars(parser.parse_args()))
