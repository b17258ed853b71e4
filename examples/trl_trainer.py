"""SWIM's loss in TRL's `SFTTrainer`: a minute on a CPU.

    pip install 'swim-fast[trl]'
    python examples/trl_trainer.py
    torchrun --nproc-per-node 2 examples/trl_trainer.py --batch-size 3    # the same losses

It renders its own clips and starts from a tiny random model. For real ones, name a file of records and a checkpoint.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from swim_fast import Collator, SampleBuilder
from swim_fast.data.batch.dataset import MixtureSampler, SwimDataset
from swim_fast.demo.clips import write_demo_data
from swim_fast.demo.texts import all_texts
from swim_fast.demo.tiny_model import build_checkpoint
from swim_fast.modeling.prepare import prepare_model
from swim_fast.options import AttentionLoss, Sampling, Source
from swim_fast.training.mixin import AttentionLossMixin


class AttentionSFTTrainer(AttentionLossMixin, SFTTrainer):
    """TRL's trainer with the attention loss in place of its own; both losses are in its logs."""

    attention_loss = AttentionLoss(layers=[1, 2], criterion="kl", text_weight=1.0)


def main(folder: Path, steps: int, batch_size: int = 6, accumulation: int = 2) -> list[dict[str, float]]:
    """Train, save a plain checkpoint in `folder` / trained, and return the log of every step."""
    args = SFTConfig(
        output_dir=str(folder / "trained"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=4e-3,
        lr_scheduler_type="constant",
        bf16=False,  # TRL's default is True
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        # Else TRL would tokenise texts, drop what the model's forward does not name, and shuffle again.
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    with args.main_process_first():
        if args.process_index == 0:
            write_demo_data(folder / "data", seed=0, train_clips=24, heldout_clips=1, workers=1)
            build_checkpoint(folder / "start", all_texts(), seed=0)
    processor = AutoProcessor.from_pretrained(folder / "start")
    model = AutoModelForImageTextToText.from_pretrained(folder / "start")
    loss = AttentionSFTTrainer.attention_loss
    prepare_model(model, layers=loss.layers, ranks=args.world_size)

    build = SampleBuilder(processor, Sampling(max_frames=4), supervision=loss.supervision)
    samples = SwimDataset([Source(path=str(folder / "data/train.jsonl"))], build)
    order = MixtureSampler(samples, args.seed)  # a shuffle in which every file has its weight
    collate = Collator(processor)
    trainer = AttentionSFTTrainer(
        model=model,
        args=args,
        # TRL takes no other kind of data set: its rows name the samples, which the data workers make.
        train_dataset=Dataset.from_dict({"index": list(order)}),
        data_collator=lambda rows: collate([samples[row["index"]] for row in rows]),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()  # a plain checkpoint of a plain model, with its processor
    return [log for log in trainer.state.log_history if "mask_loss" in log]


if __name__ == "__main__":  # the clips are rendered by processes that import this file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/trl_trainer"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=6, help="samples of a micro-batch on each rank")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    main(**vars(parser.parse_args()))
