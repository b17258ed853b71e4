"""Fields of transformers' `TrainingArguments`: which there are, and what becomes of each here.

A test holds the three lists to the installed transformers, so that a new field is looked at before it is accepted.
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

FIXED = {"remove_unused_columns": False, "label_names": ["labels"]}  # values that must not be others

_EVALUATION = "evaluation sums losses and metrics over the ranks and gathers no predictions; remove it"
_PRECISION = "evaluation runs in the precision of training; set training.bf16 or training.fp16, or remove it"
_JOBS = "`swim-fast train` trains, and evaluates as training.eval_strategy says; remove it"
_SAMPLER = "the order of the samples is a shuffle, or packing by length (data.max_tokens_per_batch); remove it"
_CHECKPOINTING = "write gradient_checkpointing, its name in every release that is supported"
_LIGER = "Liger's kernels are chosen by model.liger; remove it"
NO_EFFECT: dict[str, tuple[Any, str]] = {  # field -> default, and what is said of any other value
    "label_smoothing_factor": (0.0, "the text loss has no smoothing; remove it"),
    "average_tokens_across_devices": (True, "losses are always averaged over the global step; remove it"),
    "train_sampling_strategy": ("random", _SAMPLER),
    "length_column_name": ("length", _SAMPLER),
    "dataloader_in_order": (True, "batches keep their order, which resuming needs; remove it"),
    "use_liger_kernel": (False, _LIGER),
    "liger_kernel_config": (None, _LIGER),
    "use_cache": (False, "training keeps no keys and values; remove it"),
    "prediction_loss_only": (False, _EVALUATION),
    "eval_do_concat_batches": (True, _EVALUATION),
    "eval_use_gather_object": (False, _EVALUATION),
    "eval_accumulation_steps": (None, _EVALUATION),
    "include_for_metrics": ([], _EVALUATION),
    "batch_eval_metrics": (False, _EVALUATION),
    "bf16_full_eval": (False, _PRECISION),
    "fp16_full_eval": (False, _PRECISION),
    "enable_jit_checkpoint": (False, "SIGTERM and Ctrl-C always save a checkpoint; remove it"),
    "activation_checkpointing": (None, _CHECKPOINTING),
    "activation_checkpointing_kwargs": (None, _CHECKPOINTING),
    "parallelism_config": (None, "every rank has whole samples; divide the model by training.deepspeed, or remove it"),
    "do_train": (False, _JOBS),
    "do_eval": (False, _JOBS),
    "do_predict": (False, _JOBS),
    "local_rank": (-1, "the launcher says it; remove it"),
}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than the oldest release that is supported
HONOURED = frozenset(
    """
    output_dir per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps
    gradient_accumulation_steps auto_find_batch_size max_grad_norm neftune_noise_alpha
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon
    bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
    log_level_replica disable_tqdm include_num_input_tokens_seen skip_memory_metrics debug
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_only_model save_on_each_node save_total_limit
    load_best_model_at_end metric_for_best_model greater_is_better
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed
    """.split()
)


OWN = {"sequence_parallel": "int"}  # of this project, among them


@functools.cache
def training_fields() -> dict[str, str]:
    """Return the keys of `training` with their types: transformers' `TrainingArguments`, as its source has them, and
    those of this project."""
    package = Path(importlib.util.find_spec("transformers").origin).parent
    source = ast.parse((package / "training_args.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    fields = (node for node in classes["TrainingArguments"].body if isinstance(node, ast.AnnAssign))
    types = {field.target.id: ast.unparse(field.annotation) for field in fields}
    return types | {"fsdp": f"bool | {types['fsdp']}"} | OWN  # fsdp is annotated for the command line alone
