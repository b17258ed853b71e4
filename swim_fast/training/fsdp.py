"""Weights, gradients and optimizer states divided among the ranks by torch's FSDP2, as accelerate sets it up.

Checkpoints hold whole files: the weights as `from_pretrained` reads them and the optimizer's state by the names of the
parameters, so that any number of ranks can go on from them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from swim_fast.config import ConfigError, RunConfig
from swim_fast.families import get_family

# Options of `training.fsdp_config`: the values that work, and what is said of any other.
_WORKING: dict[str, tuple[tuple[Any, ...], str]] = {
    "version": ((2,), "version 1 is being removed from the libraries; write 2 or remove it"),
    "state_dict_type": (
        ("FULL_STATE_DICT",),
        "checkpoints would hold no weights that from_pretrained can load; remove it",
    ),
    "activation_checkpointing": (
        (False, "false"),
        "it puts modules of its own around the layers, where the maps look for them; set "
        "training.gradient_checkpointing instead",
    ),
    "cpu_offload": (
        (False, "false"),
        "the visual pass of a batch without pixels would be on another device than the gathered weights; use "
        "training.deepspeed=configs/deepspeed/zero3_offload.json without training.fsdp",
    ),
    "cpu_ram_efficient_loading": (
        (False, "false"),
        "the ranks behind the first one would be prepared without weights; remove it",
    ),
    "xla": ((False,), "there is no TPU support; remove it"),
}


def build_fsdp_config(config: RunConfig) -> dict[str, Any]:
    """Return transformers' `fsdp_config` of a run that sets `training.fsdp`, of FSDP2.

    Raises:
        ConfigError: an option that does not work here, or with which FSDP does not go together; a file that cannot be
            read.
    """
    given = config.read_options("fsdp_config") or {}
    options = {"version": 2} | {key.removeprefix("fsdp_"): value for key, value in given.items()}
    for key, (working, why) in _WORKING.items():
        if key in options and options[key] not in working:
            raise ConfigError(f"training.fsdp_config.{key} is {options[key]!r}: {why}")
    if "offload" in str(config.training["fsdp"]):
        raise ConfigError(f"training.fsdp is {config.training['fsdp']!r}: {_WORKING['cpu_offload'][1]}")
    if config.training.get("deepspeed"):
        raise ConfigError("training.fsdp and training.deepspeed both divide the model among the ranks: remove one")
    if config.model.lora and config.model.lora.quantize:
        raise ConfigError(
            f"model.lora.quantize: {config.model.lora.quantize} keeps the weights whole on every GPU, which "
            "training.fsdp divides: take ZeRO-2 (training.deepspeed=configs/deepspeed/zero2.json) or leave it out"
        )
    return options


def check_ranks(args) -> None:
    """Refuse FSDP where the libraries would leave it out, in silence.

    Raises:
        ConfigError: a single rank, or ranks on the CPU, whose model accelerate would copy (DDP).
    """
    from accelerate.utils import DistributedType

    if not args.fsdp:
        return
    if args.world_size == 1:
        raise ConfigError(
            "training.fsdp divides the model among ranks, and there is one: start several with torchrun, or remove it"
        )
    if args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise ConfigError(
            "training.fsdp needs GPUs: on the CPU accelerate would copy the whole model to every rank (DDP) and say "
            "nothing; remove training.fsdp, or divide it with training.deepspeed=configs/deepspeed/zero3.json"
        )


def choose_layers(args, model: nn.Module) -> None:
    """Let `TrainingArguments` name the classes of `model` that are gathered as one, unless the user has.

    They are those that transformers does not split among devices: the layers of decoder and vision tower. It may name
    some that this model has not, which accelerate refuses.
    """
    if not args.fsdp or args.fsdp_plugin_args.get("transformer_cls_names_to_wrap"):
        return
    there = {type(module).__name__ for module in model.modules()}
    names = there & set(model._no_split_modules or ())
    names.add(type(model.get_submodule(get_family(model).language_model).layers[0]).__name__)
    args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(sorted(names))


def load_full_state(model: nn.Module, state: dict[str, torch.Tensor], strict: bool = True) -> None:
    """Load whole tensors into a divided model, from the first rank; all ranks must take part.

    Args:
        state: by the module's names; the other ranks' is not looked at.
        strict: the state must have every name.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    own = model.state_dict()
    state = {name: value.to(own[name].dtype) for name, value in state.items()}  # the other ranks expect the model's
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(model, state if torch.distributed.get_rank() == 0 else {}, options=options)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a checkpoint folder into a divided model; only the first rank reads the file."""
    state = {}
    if torch.distributed.get_rank() == 0:  # fp32: what is trained in bf16 has its master weights in the file
        state = type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
    load_full_state(model, state)
