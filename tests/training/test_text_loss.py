"""The text loss on two ranks is that of one: under DDP, and under ZeRO-3, where no rank has the head's whole weight
outside the head's own call; with a rank that has no label, tied and wrapped heads, and activation checkpointing."""

import json
import subprocess
import sys

import pytest

from tests.training import text_loss_ranks
from tests.training.conftest import ROOT, environment


@pytest.mark.needs("deepspeed")
def test_two_ranks_equal_one(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(ROOT / "tests" / "training" / "text_loss_ranks.py")
    done = subprocess.run(
        [*launcher, script, str(tmp_path / "losses.json")],
        env={**environment(), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    for head in text_loss_ranks.HEADS:
        expected = text_loss_ranks.losses_of_one(head)
        assert expected[2] < 0.9 * expected[0]  # the same batches again: it has learnt
        for how in ("ddp", "zero3"):
            assert found[f"{how} {head}"] == pytest.approx(expected, rel=1e-4), (how, head)


def test_a_model_that_answers_logits_is_an_error(write_config):
    from swim_fast.config import load_config
    from swim_fast.modeling.text_loss import detach_text_loss
    from swim_fast.training.run import build_trainer

    trainer = build_trainer(load_config(write_config()))
    detach_text_loss(trainer.model)
    with pytest.raises(RuntimeError, match="the model answered all logits: call attach_text_loss"):
        trainer.train()
