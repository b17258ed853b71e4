"""Launches, copies and waits of a training step of the real trainer, beside those of the stock model."""

import pytest

from swim_fast.config import load_config
from tests.helpers.pretend_gpu import record
from tests.helpers.pretend_gpu.values import CpuValues
from tests.training.conftest import checkpoint, records, write_config  # noqa: F401


@pytest.fixture
def trainer_of(write_config):  # noqa: F811
    from swim_fast.training.run import build_trainer

    def build(**sections):
        sections = {"training": {"bf16": True}, "attention_loss": {"criterion": "bce"}} | sections
        return build_trainer(load_config(write_config(**sections)))

    return build


def micro_batches(trainer, count=2):
    """Forward and backward of some micro-batches as the trainer does them; what each asked of the device."""
    trainer.create_optimizer_and_scheduler(count)
    model = trainer.accelerator.prepare(trainer.model).train()
    seen = []
    batches = iter(trainer.get_train_dataloader())
    with CpuValues():
        for _ in range(count):
            with record() as happened:
                batch = next(batches)
                inputs = trainer._prepare_inputs(batch)
                items = trainer._get_num_items_in_batch([batch], trainer.args.device)
                trainer.compute_loss(model, inputs, num_items_in_batch=items).backward()
            seen.append(happened)
    return seen


@pytest.mark.parametrize("packed", [False, True])
def test_a_micro_batch_waits_for_the_device_where_the_stock_model_does(trainer_of, packed):
    """Not in our packages, and as often in forward and backward as without the attention loss."""
    packing = {"data": {"max_tokens_per_batch": 400}, "training": {"bf16": True, "per_device_train_batch_size": 1}}
    data = packing if packed else {}
    with_loss, without = micro_batches(trainer_of(**data)), micro_batches(trainer_of(attention_loss=None, **data))
    for happened, alone in zip(with_loss, without, strict=True):
        assert not happened.count("wait", ours=True), happened.describe("wait", ours=True)
        assert happened.count("wait") == alone.count("wait"), happened.describe("wait") + "\n" + alone.describe("wait")


def test_launches_of_a_micro_batch(trainer_of):
    """What the attention loss adds to the stock model's launches; 2 supervised layers."""
    (_, happened), (_, alone) = micro_batches(trainer_of()), micro_batches(trainer_of(attention_loss=None))
    text = happened.describe("launch", ours=True)
    assert happened.count("launch") - alone.count("launch") <= 60, text
    assert happened.count("launch", inside="plan.py") == 2, text
    assert happened.count("launch", inside="metrics.py") <= 3, text
    assert happened.count("launch", inside="noun_attention/triton/launch.py") <= 2 * 8, text  # of each layer
    assert happened.count("copy", ours=True) <= 5, happened.describe("copy", ours=True)
    # of queries, targets, plan, frames and the colours that normalise them


def test_a_step_waits_once_for_its_losses_and_gradient(trainer_of):
    trainer = trainer_of()
    micro_batches(trainer)
    with CpuValues(), record() as happened:
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer._get_grad_norm(trainer.model, norm)
    assert happened.count("wait", inside="nonfinite.py") == 1, happened.describe("wait")
