"""SWIM's loss in LLaMA-Factory: a workflow in place of `llamafactory-cli train`, run with llamafactory 0.9.5.

    RECORDS=runs/demo/data/train.jsonl DISABLE_VERSION_CHECK=1 python examples/llama_factory.py run.yaml

LLaMA-Factory names the workflow of a stage in its own code and has no place for another, so this one is called by
itself. It takes the same file of options. `use_reentrant_gc: false` is needed: the default drops the gradient of the
maps, and such a run ends with an error. `dataset` has to be given and is not read. `DISABLE_VERSION_CHECK=1` since
llamafactory 0.9.5 asks for transformers up to 5.6, and swim_fast for 5.17 or later.
"""

import os

from llamafactory.hparams import get_train_args, read_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.callbacks import LogCallback
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from peft import PeftModel
from torch.utils.data import Subset

from swim_fast import Collator, SampleBuilder
from swim_fast.data.batch.dataset import MixtureSampler, SwimDataset
from swim_fast.modeling.prepare import prepare_model
from swim_fast.options import AttentionLoss, Sampling, Source
from swim_fast.training.mixin import AttentionLossMixin

LOSS = AttentionLoss(layers=[1, 2], criterion="kl", text_weight=1.0)
SAMPLING = Sampling(max_frames=4)


class AttentionTrainer(AttentionLossMixin, CustomSeq2SeqTrainer):
    """LLaMA-Factory's trainer with the attention loss."""

    attention_loss = LOSS


def main() -> None:
    """Train as the options of a file or of the command line say."""
    model_args, _, training_args, finetuning_args, _ = get_train_args(read_args())
    loaded = load_tokenizer(model_args)
    processor = loaded["processor"]
    model = load_model(loaded["tokenizer"], model_args, finetuning_args, training_args.do_train)
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    prepare_model(bare, layers=LOSS.layers, ranks=training_args.world_size)
    build = SampleBuilder(processor, SAMPLING, supervision=LOSS.supervision)
    samples = SwimDataset([Source(path=os.environ["RECORDS"])], build)
    trainer = AttentionTrainer(
        model=model,
        args=training_args,
        finetuning_args=finetuning_args,
        data_collator=Collator(processor),
        # every source as often as its weight says; the trainer shuffles again
        train_dataset=Subset(samples, list(MixtureSampler(samples, training_args.seed))),
        callbacks=[LogCallback()],
        **loaded,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
