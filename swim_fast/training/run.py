"""A training run from its configuration to a plain Hugging Face checkpoint."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swim_fast.config import ConfigError, RunConfig
from swim_fast.files import atomic_write
from swim_fast.preflight import check_run

logger = logging.getLogger(__name__)


def load_model(config: RunConfig, ranks: int = 1, sharded: bool = False, group: Any = None):
    """Load model and processor of a run, the model prepared for training (`prepare_model`).

    Args:
        ranks, sharded: processes that train together, and the division of the weights among them.
        group: `SequenceGroup` of those that share samples.

    Raises:
        CheckpointError: `model.path` is no checkpoint that can be loaded.
        OptionError: an option that does not fit the model, see `prepare_model`.
        ProcessorError: options of samples that its processor contradicts.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from swim_fast.data.batch.dataset import builder_of_source
    from swim_fast.inference.loading import explain_failure, load_processor
    from swim_fast.modeling.adapters import build_quantization_config
    from swim_fast.modeling.prepare import prepare_model

    options, loss = config.model, config.attention_loss
    quantized = {}
    if options.lora and options.lora.quantize:
        compute = getattr(torch, "bfloat16" if options.dtype == "auto" else options.dtype)
        quantized = {"quantization_config": build_quantization_config(options.lora.quantize, compute)}
    processor = load_processor(options.path)
    builder = build_sample_builder(config, processor)  # what does not fit is told before the weights are read
    for source in (*config.data.train, *config.data.eval.values()):
        builder_of_source(builder, source)
    with explain_failure(options.path):
        model = AutoModelForImageTextToText.from_pretrained(
            options.path, dtype=options.dtype, attn_implementation=options.attention, **quantized
        )
    prepare_model(
        model,
        liger=options.liger,
        device="cuda" if torch.cuda.is_available() and not config.training.get("use_cpu") else "cpu",
        lora=options.lora,
        seed=config.training.get("seed", 0),
        frozen=options.freeze,
        **(loss.model_dump(include={"layers", "backend", "fused", "provider"}) if loss else {"layers": []}),
        position_ids=options.position_ids,
        packed=config.data.max_tokens_per_batch is not None,
        activation_offload=options.activation_offload,
        ranks=ranks,
        sharded=sharded,
        sequence_group=group,
        mlp_tiles=options.mlp_tiles,
    )
    return model, processor


def build_sample_builder(config: RunConfig, processor, share=None):
    """Return what makes samples of a run's records; arguments and errors as for `SampleBuilder`."""
    from swim_fast.data.sample.builder import SampleBuilder

    return SampleBuilder(processor, config.sampling, config.decoding, config.supervision, share)


@dataclass(frozen=True)
class ResolvedRun:
    """Configuration, arguments and model of a run, with the machine's settings and the layers by index."""

    config: RunConfig
    arguments: Any
    model: Any
    processor: Any


def resolve_run(config: RunConfig) -> ResolvedRun:
    """Load the model of a configuration and fill in the values that it leaves open.

    Raises:
        ConfigError: one process sees several GPUs, FSDP would be left out, or the processes cannot be divided into the
            groups that share samples. Other errors as for `load_model`.
    """
    _refuse_data_parallel(config)
    from swim_fast.modeling.noun_attention import get_attached_layers
    from swim_fast.training.arguments import build_arguments
    from swim_fast.training.fsdp import check_ranks, choose_layers

    config = config.replace(training={**_get_machine_settings(config), **config.training})
    args = build_arguments(config)  # before the model: DeepSpeed ZeRO-3 partitions it while it loads
    if args.deepspeed and args.world_size > 1:
        import deepspeed
        import torch

        deepspeed.init_distributed(torch.distributed.get_backend())  # else it would partition for a single rank

    check_ranks(args)
    zero = getattr(args, "hf_deepspeed_config", None)
    sharded = bool(args.fsdp) or (zero is not None and zero.is_zero3())
    group = _build_sequence_group(config, args.world_size)
    model, processor = load_model(config, args.world_size, sharded, group)
    choose_layers(args, model)
    if config.attention_loss is not None:
        config = config.replace(attention_loss=config.attention_loss.replace(layers=get_attached_layers(model)))
    return ResolvedRun(config, args, model, processor)


def _build_sequence_group(config: RunConfig, world: int):
    """Return the ranks with which this one shares samples; None if there are none. Errors as for `resolve_run`."""
    size = config.sequence_parallel
    if size == 1:
        return None
    from transformers import AutoConfig

    from swim_fast.inference.loading import explain_failure
    from swim_fast.modeling.sequence_group import SequenceGroup
    from swim_fast.modeling.sequence_parallel import check_group_size

    if world % size:
        raise ConfigError(
            f"training.sequence_parallel is {size}, and {world} process{'es' * (world > 1)} cannot be divided into "
            f"groups of {size}: start a multiple of {size} (torchrun --nproc-per-node), or change it"
        )
    with explain_failure(config.model.path):  # before the weights are read
        model = AutoConfig.from_pretrained(config.model.path)
    check_group_size(model, size)
    return SequenceGroup.of_world(size)


def build_trainer(config: RunConfig):
    """Return the trainer of a configuration, ready to `train()` or `evaluate()`. Errors as for `resolve_run`."""
    return _build_trainer(resolve_run(config))


def _build_trainer(run: ResolvedRun, callbacks: Sequence = ()):
    from swim_fast.data.batch.collation import Collator
    from swim_fast.data.batch.dataset import SwimDataset
    from swim_fast.data.batch.positions import PositionIds
    from swim_fast.modeling.sequence_parallel import get_frame_share, get_sequence_group
    from swim_fast.training.callbacks import EarlyStopping
    from swim_fast.training.live_maps import LiveMaps
    from swim_fast.training.trainer import SwimTrainer

    config, args, model, processor = run.config, run.arguments, run.model, run.processor
    builder = build_sample_builder(config, processor, get_frame_share(model))

    train_dataset = SwimDataset(config.data.train, builder) if config.data.train else None
    pack = train_dataset is not None and config.data.max_tokens_per_batch is not None
    # packing cannot do without
    positions = PositionIds(model.config, config.model.position_ids)
    packing = {}
    if pack:
        sampler = _build_packing_sampler(config, train_dataset, args)
        packing = {"batch_sampler": sampler, "train_collator": Collator(processor, positions, pack=True, frames=True)}
    patience = config.optimization.early_stopping_patience
    held_out = {name: SwimDataset([source], builder) for name, source in config.data.eval.items()}
    trainer = SwimTrainer(
        model=model,
        args=args,
        loss=config.attention_loss,
        on_nan=config.optimization.on_nan,
        max_skipped=config.data.max_skipped,
        batch_timeout=config.data.batch_timeout,
        learning_rates=config.optimization.learning_rates,
        callbacks=[*callbacks, *([] if patience is None else [EarlyStopping(patience)])],
        train_dataset=train_dataset,
        sequence_group=get_sequence_group(model),
        **packing,
        eval_dataset=held_out or None,
        data_collator=Collator(processor, positions, frames=True),
        processing_class=processor,
    )
    count, loss = config.data.live_maps, config.attention_loss
    if count and held_out and loss is not None:
        trainer.add_callback(
            LiveMaps(count, held_out, loss, trainer.compute_maps, lambda: trainer.callback_handler.callbacks)
        )
    return trainer


def _build_packing_sampler(config: RunConfig, dataset, args):
    """Return the sampler of packed batches, after measuring the lengths of all samples."""
    from swim_fast.data.batch.dataset import MixtureSampler
    from swim_fast.data.batch.lengths import sample_lengths
    from swim_fast.data.batch.packing import PackingSampler
    from swim_fast.training.arguments import get_data_seed

    return PackingSampler(
        MixtureSampler(dataset, get_data_seed(args)),
        sample_lengths(dataset),
        config.data.max_tokens_per_batch,
        config.data.pack_look_ahead,
        args.process_index // config.sequence_parallel,
        args.world_size // config.sequence_parallel,
    )


def train(config: RunConfig, resume: bool = False, callbacks: Sequence = ()) -> dict[str, float]:
    """Train, evaluate, and leave a plain Hugging Face checkpoint in `training.output_dir`.

    With `model.lora` that is the base with the adapters merged into it; the adapters alone are in `adapter/` below it.

    Args:
        config: the run; its effective form is saved as `config.yaml` in the output folder.
        resume: from the last checkpoint in the output folder, if there is one. A finished run is left as it is.
        callbacks: of transformers' trainer, beside those of a run.

    Returns:
        Metrics of the last evaluation and of the run; none of a run that was finished before.

    Raises:
        ConfigError: no training data, an output folder that another run is writing to, or that holds another run's
            checkpoints while `resume` is off; a checkpoint that this number of ranks cannot resume from, or that would
            keep other values than those of `config`. Other errors as for `resolve_run`.
        InterruptedRun: a signal has ended it, with a checkpoint.
        SaveError: a checkpoint or the trained model could not be written.
        NonFiniteError: a loss or gradient was not finite, and `optimization.on_nan` says to stop.
        LoaderError: a data worker has died, or gave no batch within `data.batch_timeout`.
        SkippedError: more samples were left out than `data.max_skipped` allows.
    """
    from swim_fast.training.resume import end_with_launcher, find_finished, output_lock

    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one file, e.g. data.train: [{path: train.jsonl}]")
    done = find_finished(config) if resume else None
    if done is not None:
        logger.warning(
            "the run in %s is finished (%d steps) and is left as it is; to train on, raise training.max_steps or "
            "training.num_train_epochs",
            config.output,
            done,
        )
        return {}
    check_run(config)
    end_with_launcher()
    with output_lock(config.output):
        return _train(config, resume, callbacks)


def _train(config: RunConfig, resume: bool, callbacks: Sequence) -> dict[str, float]:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from swim_fast.modeling.adapters import merge_adapters
    from swim_fast.training.checkpoints import check_resumable
    from swim_fast.training.model_card import render_model_card
    from swim_fast.training.resume import InterruptedRun
    from swim_fast.training.warm_up import start_warm_up

    checkpoint = _choose_checkpoint(config, resume)
    run = resolve_run(config)
    trainer, config, args = _build_trainer(run, callbacks), run.config, run.arguments
    output = Path(args.output_dir)
    if checkpoint:
        check_resumable(checkpoint, args, config.sequence_parallel)
    if trainer.is_world_process_zero():
        text = config.as_yaml()
        ranks = f"{args.world_size} × " * (args.world_size > 1)
        print(f"training on {ranks}{_name_device(args.device)}; configuration: {output / 'config.yaml'}", flush=True)
        with atomic_write(output / "config.yaml") as file:
            file.write(text)
        if checkpoint:
            print(f"resuming from {checkpoint}", flush=True)
    start_warm_up(run.model, config.attention_loss, args)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stopped = trainer.state.global_step < trainer.state.max_steps and not trainer.stopped_early
    if stopped:
        told = f"stopped at step {result.global_step} of {trainer.state.max_steps}; resume with --resume"
        if trainer.stopped_by is not None:
            raise InterruptedRun(f"{trainer.stopped_by.name}: {told}", trainer.stopped_by)
        logger.warning("%s", told)
        return result.metrics
    adapter = output / "adapter" if config.model.lora else None
    trainer.save_final_model(adapter or output)
    trainer.save_state()
    speed = result.metrics if trainer.trained else {}  # else it is that of no step
    metrics = speed | {"skipped_samples": trainer.count_skipped()} | _get_last_evaluation(trainer)
    trainer.save_metrics("all", metrics)
    if trainer.is_world_process_zero():
        if adapter:
            unset_hf_deepspeed_config()  # or ZeRO-3 would wait for the other ranks to load their parts
            merge_adapters(config.model.path, adapter, output, config.model.dtype)
        with atomic_write(output / "README.md") as file:
            file.write(render_model_card(config, trainer.state.global_step, metrics))
    return metrics


def _name_device(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"


def _choose_checkpoint(config: RunConfig, resume: bool) -> Path | None:
    """Return the checkpoint to resume from. Errors as for `train`."""
    from swim_fast.training.resume import find_last_checkpoint, refuse_changes

    last, named = find_last_checkpoint(config.output), config.training.get("resume_from_checkpoint")
    checkpoint = Path(named) if isinstance(named, str) else last if resume or named else None  # True: as --resume
    if last and not checkpoint:
        raise ConfigError(
            f"{config.output} already holds {last.name}: resume it with --resume, or choose another training.output_dir"
        )
    if checkpoint:
        refuse_changes(checkpoint, config)
    elif resume or named:
        logger.warning("%s holds no checkpoint: there is nothing to resume, the run begins at step 1", config.output)
    return checkpoint


def _get_last_evaluation(trainer) -> dict[str, float]:
    """Return the metrics of the final weights (maybe the best checkpoint's), from the log if they are there."""
    if not trainer.eval_dataset:
        return {}
    best = trainer.args.load_best_model_at_end and trainer.state.best_global_step
    step = best or trainer.state.global_step
    logs = [log for log in trainer.state.log_history if log["step"] == step]
    found = {key: value for log in logs for key, value in log.items() if key.startswith("eval_")}
    return found or trainer.evaluate()


def _refuse_data_parallel(config: RunConfig) -> None:
    """Raise ConfigError where transformers would wrap the model in `nn.DataParallel`, whose replicas fail."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2 or "LOCAL_RANK" in os.environ or config.training.get("use_cpu"):
        return
    program, *words = sys.argv
    started = ["-m", "swim_fast.cli"] if Path(program).name in ("swim-fast", "cli.py", "__main__.py") else [program]
    command = shlex.join(["torchrun", "--nproc-per-node", str(gpus), *started, *words])
    first, *_ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    raise ConfigError(
        f"this one process sees {gpus} GPUs, and a process trains on one: start one for each ({command}), or put "
        f"CUDA_VISIBLE_DEVICES={first} into the environment to train on a single one"
    )


def _get_machine_settings(config: RunConfig) -> dict[str, Any]:
    """Return defaults of `training` for the CPU: there is no GPU, or `use_cpu` is set."""
    import torch

    if torch.cuda.is_available() and not config.training.get("use_cpu"):
        return {}
    if config.training.get("deepspeed"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return {"use_cpu": True, "dataloader_pin_memory": False} | ({"ddp_backend": "gloo"} if ranks > 1 else {})
