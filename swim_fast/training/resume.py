"""State of an output folder: checkpoints, a finished run, or another run that is writing to it.

Nothing heavy is imported, so that it is told at once.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from swim_fast.config import ConfigError, RunConfig
from swim_fast.errors import UserError

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # transformers writes it last
LOCK = ".lock"
IN_CHECKPOINT = {  # keys whose old value would stay in effect, by what holds it
    "optimizer": (
        *(f"training.{key}" for key in ("learning_rate", "weight_decay", "optim", "optim_args")),
        *(f"training.{key}" for key in ("adam_beta1", "adam_beta2", "adam_epsilon")),
        "optimization.learning_rates",
        "model.freeze",
        "model.lora",
    ),
    "order of the samples": (
        "training.seed",
        "training.data_seed",
        "data.max_tokens_per_batch",
        "data.pack_look_ahead",
    ),
}


class InterruptedRun(UserError):
    """A run that a signal has stopped after a step; its checkpoint is saved.

    Args:
        message: what is printed.
        number: of the signal; the command exits with 128 more, as a shell says it.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_status = 128 + number


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Return the `checkpoint-<step>` of an output folder in the order of their steps.

    A folder without `trainer_state.json` is half a copy, and is not listed.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    for checkpoint in found:
        if not (checkpoint / STATE).is_file():
            logger.warning("%s is incomplete (no %s) and is not considered; it can be deleted", checkpoint, STATE)
    complete = [checkpoint for checkpoint in found if (checkpoint / STATE).is_file()]
    return sorted(complete, key=lambda path: int(path.name.partition("-")[2]))


def find_last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the complete checkpoint of the highest step in an output folder, None without one."""
    return next(reversed(list_checkpoints(folder)), None)


def find_finished(config: RunConfig) -> int | None:
    """Return the last step of the run in the output folder if it is finished and `config` asks for no more steps.

    None if it is not: files are missing, or checkpoints tell of later or fewer steps.
    """
    folder = config.output
    if not all((folder / name).is_file() for name in (STATE, "README.md")) or not any(folder.glob("*.safetensors")):
        return None
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    done, planned, most = state["global_step"], state["max_steps"], config.training.get("max_steps", -1)
    last = find_last_checkpoint(folder)
    if last is not None and last.name != f"checkpoint-{done}":
        return None
    same_epochs = math.ceil(config.training.get("num_train_epochs", 3)) == state["num_train_epochs"]
    enough = planned == most or done >= most if most > 0 else same_epochs
    return done if enough else None


def refuse_changes(checkpoint: Path, config: RunConfig) -> None:
    """Refuse a configuration that says otherwise than what would be in effect after resuming.

    Args:
        checkpoint: to resume from; the configuration of its run is read from `config.yaml` beside it, if that exists.
        config: of the run to resume.

    Raises:
        ConfigError: naming key, both values and the remedy.
    """
    file = checkpoint.parent / "config.yaml"
    if not file.is_file():
        return
    from transformers import TrainingArguments

    defaults = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}

    def get(tree: Any, key: str) -> Any:
        section, name = key.split(".")
        value = (tree.get(section) or {}).get(name, defaults.get(name) if section == "training" else None)
        return getattr(value, "value", value)

    was, now = yaml.safe_load(file.read_text(encoding="utf-8")), config.model_dump()
    for what, keys in IN_CHECKPOINT.items():
        for key in keys:
            if key.split(".")[0] in was and get(was, key) != get(now, key):
                raise ConfigError(
                    f"{key} is {get(now, key)!r}, but {checkpoint} was saved by a run with {get(was, key)!r}, which "
                    f"the {what} would keep: set it back, or begin a new run with model.path={checkpoint} and another "
                    "training.output_dir"
                )


@contextlib.contextmanager
def output_lock(folder: Path) -> Iterator[None]:
    """Hold an output folder, which is made if absent, for this process alone; of several ranks, the first holds it.

    The kernel gives up the lock of a process that ends, however it does.

    Raises:
        ConfigError: another run holds it, or it cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise ConfigError(
            f"training.output_dir is {str(folder)!r}, which cannot be written: {error.strerror}; make it writable or "
            "name another"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held by forked workers that live on
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"another run is writing to {folder}: wait for it, end it, or choose another training.output_dir"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): take care that no other run writes there", folder, error.strerror)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


LAUNCHER_GONE = "the launcher of this rank is gone, so the rank ends; resume with --resume"


def end_with_launcher(every: float = 1.0) -> None:
    """End this rank when its launcher is gone, from a thread of its own; without a launcher nothing is done.

    A rank whose launcher was killed would else write on, beside the run that is resumed meanwhile.
    """
    parent = os.getppid()
    if "LOCAL_RANK" not in os.environ or parent == 1:
        return

    def watch():
        while os.getppid() == parent:
            time.sleep(every)
        os.write(2, f"swim-fast: {LAUNCHER_GONE}\n".encode())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
