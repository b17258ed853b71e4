"""The attention loss as a mixin of a plain `transformers.Trainer`; tests/examples compares it with `SwimTrainer`."""

import logging

import pytest
from torch.utils.checkpoint import checkpoint as run_checkpointed
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from swim_fast import Collator, SampleBuilder
from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.errors import OptionError
from swim_fast.modeling.noun_attention import ReentrantCheckpointingError
from swim_fast.modeling.prepare import prepare_model
from swim_fast.options import AttentionLoss, Sampling, Source
from swim_fast.training.mixin import AttentionLossMixin
from swim_fast.training.step import compute_losses, count_items, weigh_losses
from tests.training.conftest import write_records

LOSS = AttentionLoss(layers=[0, 1], criterion="kl")


class WithAttentionLoss(AttentionLossMixin, Trainer):
    attention_loss = LOSS


@pytest.fixture
def make_trainer(checkpoint, records, tmp_path):
    """make_trainer(…): a trainer on the eight records; keywords of its arguments, or of the trainer."""

    def make(path=records, compute_loss_func=None, **changes):
        model = prepare_model(AutoModelForImageTextToText.from_pretrained(checkpoint), layers=LOSS.layers)
        processor = AutoProcessor.from_pretrained(checkpoint)
        build = SampleBuilder(processor, Sampling(max_frames=4), supervision=LOSS.supervision)
        samples = SwimDataset([Source(path=str(path))], build)
        fixed = {"output_dir": str(tmp_path), "remove_unused_columns": False, "use_cpu": True, "report_to": "none"}
        fixed |= {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "dataloader_pin_memory": False}
        args = TrainingArguments(**fixed | changes)
        data = {"train_dataset": samples, "eval_dataset": samples, "data_collator": Collator(processor)}
        return WithAttentionLoss(model, args, compute_loss_func=compute_loss_func, **data)

    return make


def test_evaluation_has_the_loss_of_training(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=8)
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    model = trainer.model.eval()
    losses = compute_losses(model, batch, LOSS)
    items = count_items([batch])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses.weigh(items, LOSS).item(), rel=1e-6)
    parts = losses.divide(items)
    assert weigh_losses(parts, LOSS) == LOSS.text_weight * parts.text + LOSS.mask_weight * parts.mask
    assert vars(trainer).get("sums") is None  # the logs of training count training alone


def test_items_of_no_batch_and_of_several(make_trainer):
    trainer = make_trainer()
    batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(3)]
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    pairs = sum(len(batch["mask_targets"]) for batch in batches)
    assert count_items(batches).tolist() == [labels, pairs, 0] and pairs > 0
    assert count_items([]).tolist() == [0, 0, 0]


def test_records_that_are_left_out_are_told(make_trainer, tmp_path, caplog):
    path = write_records(tmp_path / "bad.jsonl", [{"conversations": []}] * 2)
    with caplog.at_level(logging.WARNING, "swim_fast.training.mixin"):
        trainer = make_trainer(path, per_device_train_batch_size=2)
        trainer.train()
    assert caplog.text.count("left out: ") == 2 and "bad.jsonl" in caplog.text
    (log,) = [log for log in trainer.state.log_history if "text_loss" in log]
    assert log["skipped"] == 2 and log["pairs"] == 0 and log["text_loss"] == 0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("remove_unused_columns", {"remove_unused_columns": True}),
        ("label_smoothing_factor", {"label_smoothing_factor": 0.1}),
        ("compute_loss_func", {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.loss}),
    ],
)
def test_arguments_that_would_be_passed_over_are_refused(make_trainer, name, changes):
    with pytest.raises(OptionError, match=name):
        make_trainer(**changes)


def test_a_process_with_several_gpus_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(OptionError, match="2 GPUs"):
        make_trainer()


def test_a_forward_that_computes_a_loss_of_its_own_is_an_error(make_trainer, monkeypatch):
    trainer = make_trainer()
    forward = trainer.model.forward

    def replaced(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = None
        return outputs

    monkeypatch.setattr(trainer.model, "forward", replaced)
    with pytest.raises(RuntimeError, match="forward was replaced"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_maps_without_gradient_are_an_error(make_trainer):
    """Also where a trainer forces reentrant checkpointing behind transformers' back."""
    trainer = make_trainer()
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in trainer.model.model.language_model.layers:
        layer._gradient_checkpointing_func = lambda call, *args: run_checkpointed(call, *args, use_reentrant=True)
    with pytest.raises(ReentrantCheckpointingError, match="the maps have no gradient"):
        trainer.train()
