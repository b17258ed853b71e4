"""Data workers that hang, die, or find no shared memory: the run ends and says what to do."""

import os
import signal
import time

import pytest
import torch

from swim_fast.config import load_config
from swim_fast.training.loader import LoaderError, explain_loader
from swim_fast.training.run import build_trainer


def hang():
    time.sleep(100)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def lose_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (hang, "timed out after 2"),
        (die, "is killed by signal: Killed|exited unexpectedly"),
        (lose_memory, "unable to allocate shared memory"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "packed", "evaluate"])
def test_workers_that_give_no_batch_end_the_run(write_config, records, monkeypatch, fault, said, mode):
    data = {"train": [{"path": str(records)}], "eval": {"own": {"path": str(records)}}, "batch_timeout": 2.0}
    if mode == "packed":
        data["max_tokens_per_batch"] = 400
    batch = {"per_device_train_batch_size": 1, "dataloader_num_workers": 1}
    trainer = build_trainer(load_config(write_config(data=data, training=batch)))
    monkeypatch.setattr("swim_fast.data.batch.collation.Collator.__call__", lambda self, items: fault())
    begin = time.monotonic()
    with pytest.raises(LoaderError, match=said) as error:
        trainer.evaluate() if mode == "evaluate" else trainer.train()
    assert time.monotonic() - begin < 60
    assert "--shm-size" in str(error.value) and "data.batch_timeout" in str(error.value)
    assert "\n" not in str(error.value)


def refuse_signals():
    kept = signal.getsignal(signal.SIGINT) is signal.SIG_IGN and signal.SIGTERM in signal.pthread_sigmask(
        signal.SIG_BLOCK, ()
    )
    raise RuntimeError(f"the worker outlives signals: {kept}")


@pytest.mark.parametrize("mode", ["train", "packed", "evaluate"])
def test_workers_outlive_signals(write_config, records, monkeypatch, mode):
    """Which a terminal or scheduler sends to all processes of a run, and the trainer answers with a checkpoint."""
    data = {"train": [{"path": str(records)}], "eval": {"own": {"path": str(records)}}}
    if mode == "packed":
        data["max_tokens_per_batch"] = 400
    batch = {"per_device_train_batch_size": 1, "dataloader_num_workers": 1}
    trainer = build_trainer(load_config(write_config(data=data, training=batch)))
    monkeypatch.setattr("swim_fast.data.batch.collation.Collator.__call__", lambda self, items: refuse_signals())
    with pytest.raises(RuntimeError, match="the worker outlives signals: True"):
        trainer.evaluate() if mode == "evaluate" else trainer.train()


def test_other_errors_keep_their_traceback():
    with pytest.raises(torch.OutOfMemoryError), explain_loader():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ZeroDivisionError), explain_loader():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="^Caught"), explain_loader():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback: …\nRuntimeError: a fault")
