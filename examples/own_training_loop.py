"""SWIM's loss in a training loop of your own: plain PyTorch on any stock Qwen2.5-VL, half a minute on a CPU.

    python examples/own_training_loop.py

It renders its own clips and starts from a tiny random model. For real ones, name a file of records and a checkpoint.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from swim_fast import Collator, SampleBuilder, attach_noun_attention, detach_noun_attention, mask_alignment_loss
from swim_fast.data.source.records import RecordFile
from swim_fast.demo.clips import write_demo_data
from swim_fast.demo.texts import all_texts
from swim_fast.demo.tiny_model import build_checkpoint
from swim_fast.modeling.positions import set_position_rule
from swim_fast.options import Sampling


def main(folder: Path, steps: int) -> list[tuple[float, float]]:
    """Train, save a plain checkpoint in `folder` / trained, and return (text loss, mask loss) of every step."""
    torch.manual_seed(0)
    records = write_demo_data(folder / "data", seed=0, train_clips=24, heldout_clips=1, workers=1).train
    checkpoint = build_checkpoint(folder / "start", all_texts(), seed=0)

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    set_position_rule(model, "pretraining")  # of text behind long videos, which transformers from 5.3 on changes
    attach_noun_attention(model, layers=[1, 2])  # the model's own attention still computes its output

    # A record becomes tokens, pixels, and the rows of its tagged nouns with their masks; samples become a batch.
    build, collate = SampleBuilder(processor, Sampling(max_frames=4)), Collator(processor)
    loader = DataLoader(
        RecordFile(records), batch_size=12, shuffle=True, collate_fn=lambda batch: collate([build(r) for r in batch])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    while len(losses) < steps:
        for batch in loader:
            about = {key: batch.pop(key) for key in ("mask_targets", "samples", "problems", "notes")}
            outputs = model(**batch)  # labels give the text loss, noun_queries one map per layer
            mask_loss = mask_alignment_loss(outputs.attentions, about["mask_targets"], criterion="kl")
            (outputs.loss + mask_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append((outputs.loss.item(), mask_loss.item()))
            print(f"step {len(losses):3}   text loss {losses[-1][0]:.3f}   mask loss {losses[-1][1]:.3f}")
            if len(losses) == steps:
                break

    detach_noun_attention(model).save_pretrained(folder / "trained")  # a plain checkpoint of a plain model
    processor.save_pretrained(folder / "trained")
    return losses


if __name__ == "__main__":  # the clips are rendered by processes that import this file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/own_training_loop"))
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.steps)
