"""SWIM's loss in ms-swift: a plugin for `swift sft`, run with ms-swift 4.6.0.

    RECORDS=runs/demo/data/train.jsonl swift sft --external_plugins examples/ms_swift_plugin.py \\
        --model runs/demo/start --model_type qwen2_5_vl --template swim --dataset swim --split_dataset_ratio 0 \\
        --tuner_type full --gradient_checkpointing_kwargs '{"use_reentrant": false}'

Samples are this project's: swift's own template and media code are not used. `use_reentrant` is needed: swift's default
(but for plain DDP) drops the gradient of the maps, and such a run ends with an error.
"""

import os

import transformers
from datasets import Dataset
from peft import PeftModel
from swift.dataset import DatasetLoader, DatasetMeta, register_dataset
from swift.template import Template, TemplateMeta, register_template
from swift.trainers import DataLoaderMixin, SwiftMixin, TrainerFactory

from swim_fast import Collator, SampleBuilder
from swim_fast.data.batch.dataset import MixtureSampler, SwimDataset
from swim_fast.errors import OptionError
from swim_fast.modeling.prepare import prepare_model
from swim_fast.options import AttentionLoss, Sampling, Source
from swim_fast.training.mixin import AttentionLossMixin

RECORDS = os.environ["RECORDS"]
LOSS = AttentionLoss(layers=[1, 2], criterion="kl", text_weight=1.0)
SAMPLING = Sampling(max_frames=4)
SOURCES = [Source(path=RECORDS)]


class RecordLoader(DatasetLoader):
    """Names the samples, every source as often as its weight says; swift shuffles the names and deals them out."""

    def load(self, dataset_syntax=None, dataset_meta=None, *, use_hf=None):
        return Dataset.from_dict({"index": list(MixtureSampler(SwimDataset(SOURCES, None), seed=42))})


class RecordTemplate(Template):
    """Makes samples of records and batches of samples."""

    def init_processor(self, processor):
        super().init_processor(processor)
        self.samples = SwimDataset(SOURCES, SampleBuilder(processor, SAMPLING, supervision=LOSS.supervision))

    def encode(self, inputs, **kwargs):
        return {"sample": self.samples[inputs["index"]]}

    def data_collator(self, batch, *, padding_to=None):
        return Collator(self.processor)([row["sample"] for row in batch])

    def pre_forward_hook(self, model, args, kwargs):
        return args, kwargs  # swift's would embed the video itself and drop the queries

    def print_inputs(self, inputs):
        print(inputs["sample"])


class AttentionTrainer(AttentionLossMixin, SwiftMixin, DataLoaderMixin, transformers.Trainer):
    """Swift's trainer with the attention loss."""

    attention_loss = LOSS

    def __init__(self, model, args, template, *others, **kwargs):
        if template.padding_free or template.sequence_parallel_size > 1:
            raise OptionError("packing, padding_free and sequence_parallel_size cut samples: leave them out")
        if args.enable_dft_loss or args.enable_channel_loss:
            raise OptionError("enable_dft_loss and enable_channel_loss: the attention loss takes their place")
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        prepare_model(bare, layers=LOSS.layers, ranks=args.world_size)
        super().__init__(model, args, template, *others, **kwargs)


register_dataset(DatasetMeta(dataset_name="swim", dataset_path=RECORDS, loader=RecordLoader))
register_template(TemplateMeta("swim", prefix=[], prompt=["{{QUERY}}"], chat_sep=None, template_cls=RecordTemplate))
TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{AttentionTrainer.__name__}"
