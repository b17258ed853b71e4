"""Lines of a run: one for each log, and what its end says. Logs have the names of transformers' trainer."""

import logging

import pytest

from swim_fast.quiet import quiet_libraries
from swim_fast.training.progress import format_log, format_seconds

TRAINING = {
    "loss": 0.97648, "grad_norm": 0.9, "learning_rate": 2e-5, "text_loss": 0.70166, "mask_loss": 0.27718,
    "pointing_accuracy": 0.335, "mass_in_mask": 0.18, "soft_iou": 0.15, "tokens_per_second": 4455.7, "epoch": 0.4,
}  # fmt: skip
EVALUATION = {
    "eval_held_out_loss": 0.643, "eval_held_out_text_loss": 0.396, "eval_held_out_mask_loss": 0.247,
    "eval_held_out_pointing_accuracy": 0.366, "eval_held_out_mass_in_mask": 0.224, "eval_held_out_soft_iou": 0.161,
    "eval_held_out_runtime": 2.2, "eval_held_out_steps_per_second": 5.1, "epoch": 0.4,
}  # fmt: skip


def test_a_training_log_is_one_line():
    line = format_log(TRAINING, 50, 400, 200.0)
    assert line == (
        "step  50/400  loss 0.976 (text 0.702, mask 0.277)  pointing 34%  lr 2.0e-05  4,456 tokens/s  3 min 20 s left"
    )
    assert "7 samples skipped" in format_log(TRAINING | {"skipped": 7}, 50, 400)


def test_text_alone_has_no_mask():
    text = {key: TRAINING[key] for key in ("loss", "text_loss", "learning_rate")}
    assert format_log(text, 1, 4) == "step 1/4  loss 0.976 (text 0.702)  lr 2.0e-05"


def test_an_evaluation_is_one_line():
    assert format_log(EVALUATION, 50, 400) == (
        "step  50/400  evaluation held_out:  loss 0.643 (text 0.396, mask 0.247)  pointing 37%  mass in mask 0.22  "
        "soft IoU 0.16"
    )


def test_other_logs_are_told_too():
    assert format_log({"train_runtime": 61.2}, 4, 4) == "trained to step 4 in 1 min 1 s"
    assert format_log({"mine": 3, "epoch": 1.0}, 4, 4) == "step 4/4  mine 3"


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "1 min 0 s"), (3.2, "3 s"), (3600 * 5 + 430, "5 h 7 min")])
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_libraries_are_quiet_about_what_is_no_news(caplog):
    logger = logging.getLogger("transformers.trainer_utils")
    try:
        quiet_libraries()
        quiet_libraries()
        assert len(logger.filters) == 1
        with caplog.at_level(logging.WARNING):
            logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from …")
            logging.getLogger("bitsandbytes.backends.cpu.ops").warning("another")
            logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU or other …")
        assert caplog.messages == ["another"]
    finally:
        for name in ("transformers.trainer_utils", "bitsandbytes.backends.cpu.ops", "DeepSpeed"):
            logging.getLogger(name).filters.clear()
