"""Checkpoints that are whole or absent, and the runs that may be resumed from them.

A checkpoint is written below `incomplete/` in the output folder and renamed to `checkpoint-<step>` when every rank is
done; older ones are deleted after that. Whatever ends the run while it saves, the last `checkpoint-*` can be resumed.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from swim_fast.config import ConfigError
from swim_fast.errors import UserError
from swim_fast.training.resume import STATE, find_last_checkpoint, list_checkpoints

STAGING = "incomplete"  # folder in the output folder; its name must not begin as those of checkpoints do
LAYOUT = "layout.json"


class SaveError(UserError, OSError):
    """A checkpoint or model that could not be saved; the message names folder, reason and what to resume from."""


@dataclass(frozen=True)
class Layout:
    """Distribution of an optimizer step's samples, saved with each checkpoint as `layout.json`.

    Attributes:
        ranks: number of processes.
        batch: samples of one rank's micro-batch (`per_device_train_batch_size`).
        accumulation: micro-batches of a rank per step (`gradient_accumulation_steps`).
        zero_stage: of DeepSpeed; None without it.
        fsdp: the optimizer's state is in FSDP's file, by the names of the parameters.
        sequence_parallel: processes that share each sample.
    """

    ranks: int
    batch: int
    accumulation: int
    zero_stage: int | None = None
    fsdp: bool = False
    sequence_parallel: int = 1

    @classmethod
    def from_arguments(cls, args, sequence_parallel: int = 1) -> "Layout":
        """Return the layout of `transformers.TrainingArguments`."""
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        stage = deepspeed.get_value("zero_optimization.stage", 0) if deepspeed else None
        batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        return cls(args.world_size, batch, accumulation, stage, bool(args.fsdp), sequence_parallel)

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> "Layout | None":
        """Return the layout that a checkpoint was saved with, None if it has none."""
        file = checkpoint / LAYOUT
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def write(self, checkpoint: Path) -> None:
        (checkpoint / LAYOUT).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @property
    def engine(self) -> str:
        """What the optimizer's state is read by, in words."""
        if self.fsdp:
            return "with FSDP"
        return "without DeepSpeed and FSDP" if self.zero_stage is None else f"with DeepSpeed ZeRO-{self.zero_stage}"

    @property
    def samples(self) -> int:
        """Samples of an optimizer step."""
        return self.groups * self.batch * self.accumulation

    @property
    def groups(self) -> int:
        """Processes with samples of their own, or groups of those that share them."""
        return self.ranks // self.sequence_parallel


def check_resumable(checkpoint: Path, args, sequence_parallel: int = 1) -> None:
    """Refuse to resume from a checkpoint in a way that would lose optimizer state or samples.

    The order of the samples depends on seed and epoch alone, and each step takes the next ones. As long as their number
    stays the same, a run without DeepSpeed (with FSDP or without) may be resumed with any number of ranks: each step
    sees the samples it would have seen. (At the end of an epoch, the last step repeats samples to give all ranks the
    same number, which depends on the number of ranks.)

    Args:
        checkpoint: folder to resume from. One without `layout.json` is not checked.
        args: `TrainingArguments` of the run to resume.
        sequence_parallel: processes that share each sample.

    Raises:
        ConfigError: naming how the checkpoint was saved and how to resume.
    """
    saved, now = Layout.from_checkpoint(checkpoint), Layout.from_arguments(args, sequence_parallel)
    if saved is None or saved == now:
        return
    was = f"{checkpoint} was saved by {saved.ranks} ranks"
    if (saved.zero_stage is None, saved.fsdp) != (now.zero_stage is None, now.fsdp):
        raise ConfigError(
            f"{was} {saved.engine}, and its optimizer state can only be read so: set training.deepspeed and "
            "training.fsdp likewise"
        )
    if saved.samples != now.samples:
        per_rank = saved.samples // now.groups
        batch = now.batch if per_rank % now.batch == 0 else 1
        remedy = f"set training.per_device_train_batch_size={batch} training.gradient_accumulation_steps="
        remedy = f"{remedy}{per_rank // batch}" if saved.samples % now.groups == 0 else "choose another number of ranks"
        raise ConfigError(
            f"{was}{_describe_sharing(saved)} x {saved.batch} samples x {saved.accumulation} accumulation = "
            f"{saved.samples} samples per step; now it would be {now.ranks}{_describe_sharing(now)} x {now.batch} x "
            f"{now.accumulation} = {now.samples}, so that the position in "
            f"the data and the learning rate's schedule would not fit: {remedy}"
        )
    if saved.zero_stage is not None and (saved.ranks, saved.zero_stage) != (now.ranks, now.zero_stage):
        if args.hf_deepspeed_config.get_value("checkpoint.load_universal", False):
            return
        (tag,) = (checkpoint / "latest").read_text(encoding="utf-8").split()
        raise ConfigError(
            f"{was} with DeepSpeed ZeRO-{saved.zero_stage}, whose optimizer state is split among that many; "
            f"this run has {now.ranks} with ZeRO-{now.zero_stage}. Resume with as many and that stage, or convert it:\n"
            f"  python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
            f"--input_folder {checkpoint / tag} --output_folder {checkpoint / tag}_universal\n"
            f'and add "checkpoint": {{"load_universal": true}} to the file that training.deepspeed names'
        )


def _describe_sharing(layout: Layout) -> str:
    return f" / {layout.sequence_parallel} (training.sequence_parallel)" if layout.sequence_parallel > 1 else ""


class CheckpointingTrainer(Trainer):
    """A `transformers.Trainer` that saves whole checkpoints or none; its overrides are listed in hf_hooks.py."""

    _staged: Path | None = None  # folder of a checkpoint that is being written

    @contextlib.contextmanager
    def _staging(self, folder: Path, what: str):
        """Yield a folder below `folder` to write `what` into; after the block every rank has written its part.

        A rank that fails raises `SaveError` without waiting for the others, which may be in the middle of a collective:
        the launcher ends them, or their connection to it breaks.
        """
        staging = folder / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # left by a run that ended while it saved
        self.accelerator.wait_for_everyone()
        try:
            yield staging
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' writers have their own
            shutil.rmtree(staging, ignore_errors=True)
            last = find_last_checkpoint(self.args.output_dir)
            rest = f"resume from {last} with --resume" if last else "start again (there is no checkpoint yet)"
            raise SaveError(
                f"{what} could not be saved in {folder}: {str(error) or type(error).__name__}. If the disk is full, "
                f"free space there or lower training.save_total_limit; then {rest}"
            ) from error
        self.accelerator.wait_for_everyone()

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *rest) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        # of a finished run that is resumed, say to save its model, transformers 5.17 would train one more step
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        ranks_on_cpu = self.args.world_size > 1 and self.args.device.type == "cpu" and not self.is_deepspeed_enabled
        if not (ranks_on_cpu and checkpoint and Path(checkpoint, OPTIMIZER_NAME).is_file()):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # transformers 5.17 would have each rank load to "cpu:0", a device that torch does not know
        for loader, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            loader.load_state_dict(torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # gathered, a head that is the embeddings is a tensor of its own, and would be written a second time
        model = self.accelerator.unwrap_model(self.model)
        once = {name for name, _ in model.named_parameters()}
        for name, _ in model.named_parameters(remove_duplicate=False):
            if state_dict is not None and name not in once:
                state_dict.pop(name, None)
        # Loading under ZeRO-3 keeps renamings that this checkpoint had no use for. Undone, they would make
        # `model.model.layers` of the published `model.layers`.
        renamings = getattr(model, "_weight_conversions", None)
        if renamings is not None:
            model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # transformers would write the weights a second time, under the module's names
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _get_output_dir(self, trial) -> str:
        return str(self._staged or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staged is None:  # else it is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(super()._get_output_dir(trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        with self._staging(folder, final.name) as staging:
            try:
                self._staged = staging
                super()._save_checkpoint(model, trial)
            finally:
                self._staged = None
            staged = staging / final.name
            # transformers looked for it in the staging folder; it may also be one saved before its evaluation
            best = folder / f"checkpoint-{self.state.best_global_step}"
            found = best == final or best.is_dir()
            if found:
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                group = getattr(self, "sequence_group", None)
                Layout.from_arguments(self.args, group.ranks if group else 1).write(staged)
                if found:
                    self.state.save_to_json(str(staged / STATE))
        if self.args.should_save:
            if final.exists():
                final.rename(staging / "replaced")
            staged.rename(final)
            shutil.rmtree(staging)
            self._delete_older(folder, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _delete_older(self, folder: Path, newest: Path) -> None:
        """Keep `save_total_limit` complete checkpoints, the newest and the best among them.

        transformers may take an incomplete folder for the newest and delete the good one.
        """
        best = self.state.best_model_checkpoint
        kept = {newest, Path(best)} if best else {newest}
        older = [checkpoint for checkpoint in list_checkpoints(folder) if checkpoint not in kept]
        surplus = len(older) + len(kept) - (self.args.save_total_limit or len(older) + len(kept))
        for checkpoint in older[: max(surplus, 0)]:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def save_final_model(self, folder: Path) -> None:
        """Save the trained model as transformers does (adapters as peft does), all of its files or none.

        Raises:
            SaveError: if they could not be written.
        """
        with self._staging(folder, "the trained model") as staging:
            self.save_model(str(staging))
        if self.args.should_save:
            for item in staging.iterdir():
                if item.is_dir():  # of weights that DeepSpeed was told not to gather
                    shutil.rmtree(folder / item.name, ignore_errors=True)
                os.replace(item, folder / item.name)
            staging.rmdir()
        self.accelerator.wait_for_everyone()
