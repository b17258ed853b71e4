"""The `training` section of a configuration as transformers takes it."""

from transformers import TrainingArguments

from swim_fast.config import ConfigError, RunConfig
from swim_fast.errors import SEE_DOCTOR
from swim_fast.recipes import find_recipe
from swim_fast.training.fsdp import build_fsdp_config
from swim_fast.training_fields import FIXED, OWN


def build_arguments(config: RunConfig) -> TrainingArguments:
    """Return `transformers.TrainingArguments` of the `training` section, with this project's defaults.

    Raises:
        ConfigError: a value that transformers refuses, or one of FSDP's, see `build_fsdp_config`.
    """
    # transformers would wait for the device at every micro-batch, to leave out of its log what the run refuses anyway
    training = {key: value for key, value in config.training.items() if key not in OWN}
    values = {"logging_nan_inf_filter": False, **training, "output_dir": str(config.output), **FIXED}
    if values.get("gradient_checkpointing"):  # the reentrant kind drops the gradient of the noun maps
        given = values.get("gradient_checkpointing_kwargs") or {}
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False} | given
    accelerate = values.get("accelerator_config") or {}
    if isinstance(accelerate, dict):  # batches from page-locked memory are copied while the host goes on
        values["accelerator_config"] = {"non_blocking": values.get("dataloader_pin_memory", True)} | accelerate
    if config.data.max_tokens_per_batch is not None:
        values["per_device_train_batch_size"] = 1
    if config.optimization.early_stopping_patience is not None:  # a resumed run counts on where it was
        values.setdefault("restore_callback_states_from_checkpoint", True)
    if values.get("fsdp"):
        values["fsdp_config"] = build_fsdp_config(config)
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = str(find_recipe(values["deepspeed"]))
    try:
        return TrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"training: {error}{SEE_DOCTOR * isinstance(error, ImportError)}") from error


def get_data_seed(args: TrainingArguments) -> int:
    """Return the seed of the order of the samples."""
    return args.seed if args.data_seed is None else args.data_seed
