"""`swim-fast config init`: a commented YAML file for one's records and GPUs."""

import importlib.util
import json
import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from swim_fast.errors import OptionError
from swim_fast.files import atomic_write
from swim_fast.jobs import ConfigInit
from swim_fast.options import Source
from swim_fast.preflight import check_input, check_model

LOOKED_AT = 200  # records, from the first
SAMPLES_PER_STEP = 32  # in the paper
ACTIVATIONS = 20  # GiB that a step of the recipes takes beside weights and optimizer, at most


@dataclass(frozen=True)
class Contents:
    """Counts over the first records of a file."""

    records: int
    readable: int
    tagged: int
    problems: int


def look_at(options: ConfigInit) -> Contents:
    """Look at the first records of the data.

    Raises:
        OptionError: none can be read, or the media are not where they are said to be.
    """
    from swim_fast.data.source.errors import DataError
    from swim_fast.data.source.records import RecordFile

    records = RecordFile.from_source(Source(path=options.data, media=options.media))
    readable = tagged = problems = 0
    first = None
    for index in range(min(len(records), LOOKED_AT)):
        try:
            record = records[index]
        except DataError as error:
            first, problems = first or error, problems + 1
            continue
        readable, tagged = readable + 1, tagged + bool(record.objects)
        if record.media is not None and readable == 1 and not record.media.exists():
            raise OptionError(f"{options.data}: record {index} names {record.media}, which is not there: give --media")
    if not readable:
        raise OptionError(f"{options.data} has no record that can be read: {first or 'it is empty'}")
    return Contents(len(records), readable, tagged, problems)


def find_gpus() -> list[float]:
    """Return the memory in GiB of each GPU that nvidia-smi sees; none without it."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) / 1024 for line in done.stdout.split() if line.isdigit()] if done.returncode == 0 else []


def count_parameters(model: str) -> int:
    """Return the number of values in the safetensors files of a local checkpoint; 0 without such files."""
    count = 0
    for path in Path(model).glob("*.safetensors"):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(size))
            except (ValueError, MemoryError, OverflowError):
                return 0  # loading tells that the file is broken
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def write_config(options: ConfigInit) -> str:
    """Write the file and return what there is to say about it.

    Raises:
        OptionError: the file exists, or something that is named does not. Errors as for `look_at`.
    """
    if Path(options.out).exists():
        raise OptionError(f"{options.out} exists and is left as it is: choose another name, or remove it")
    check_input(options.data, "--data")
    if options.eval is not None:
        check_input(options.eval, "--eval")
    check_model(options.model, "--model")
    seen = find_gpus() if options.gpus is None else []
    gpus = len(seen) if options.gpus is None else options.gpus
    memory = options.gpu_memory or min(seen, default=80.0)
    text = render(options, look_at(options), gpus, memory)
    with atomic_write(Path(options.out)) as file:
        file.write(text)
    dry = f"  swim-fast train {options.out} --dry-run" + f" --gpus {gpus} --gpu-memory {memory:g}" * bool(gpus)
    start = f"torchrun --nproc-per-node {gpus} -m swim_fast" if gpus > 1 else "swim-fast"
    return f"{options.out}\n\nnext:\n{dry}\n  {start} train {options.out}"


def render(options: ConfigInit, contents: Contents, gpus: int, memory: float) -> str:
    """Return the YAML text for records and GPUs: the settings of the packaged recipe that is nearest, and why."""
    size = re.search(r"(\d+(?:\.\d+)?)b\b", options.model.lower())
    named = 1.2 * float(size.group(1)) if size else 8.4  # names leave out embeddings and vision tower
    counted = count_parameters(options.model)
    billions = counted / 1e9 or named
    states = 15 * billions  # GiB: 16 bytes a parameter for weights, gradients and AdamW
    whole = gpus > 0 and gpus * (memory - ACTIVATIONS) >= states
    quantize = gpus > 0 and not whole and memory < 2 * billions + ACTIVATIONS
    roomy = memory >= 70
    if not gpus:
        why = "no GPU: everything runs on the CPU, which is for tiny models and trials"
    elif whole:
        recipe = "qwen2_5_vl_7b_8xh100" if roomy else "qwen2_5_vl_7b_8xa100"
        why = f"as {recipe}: all weights are trained, as the {states:.0f} GiB of their states fit on the GPUs together"
    else:
        why = f"near lora_24gb: adapters, as the {states:.0f} GiB of states of all weights would not fit"
    flash = gpus > 0 and importlib.util.find_spec("flash_attn") is not None
    accumulate = max(1, round(SAMPLES_PER_STEP / max(gpus, 1)))
    epochs = 1 if contents.records >= 2000 else 3
    steps = epochs * math.ceil(contents.records / (accumulate * max(gpus, 1)))  # an epoch's last step may be short
    every = max(1, steps // 10)
    problems = contents.problems
    unusable = f", and {problems} cannot be used (swim-fast data check tells why)" if problems else ""
    lines = [
        f"# For {gpus} GPU{'s' * (gpus != 1)}" + f" of {memory:g} GiB" * bool(gpus) + f": {why}.",
        f"# {contents.records} records; of the first {contents.readable + problems}, {contents.tagged} have "
        f"tagged nouns{unusable}.",
        "# Every key: docs/configuration.md.",
        "model:",
        f"  path: {json.dumps(options.model)}",
    ]
    if not size and not counted:
        lines.append("  # the name tells no size: 7B was assumed; the dry run counts")
    if gpus:
        lines.append("  dtype: bfloat16")
        lines.append(
            f"  attention: {'flash_attention_2' if flash else 'sdpa # flash_attention_2 once it is installed'}"
        )
    if gpus and not whole:
        lines.append(f"  lora: {'{quantize: nf4} # weights in 4 bits' if quantize else '{}'}")
    if whole and not roomy:
        lines.append("  activation_offload: true # what checkpointing keeps lies in the host's memory")
    lines += ["data:", "  train:", *_source(options.data, options.media, "    - ", "      ")]
    if options.eval is not None:
        lines += ["  eval:", "    held_out:", *_source(options.eval, options.media, "      ", "      ")]
    lines += [
        f"  max_pixels: {401408 if whole else 301056} # {512 if whole else 384} tokens for two frames",
        f"  max_tokens: {16384 if whole and roomy else 10240 if whole else 8192} # a longer clip gets fewer frames",
    ]
    if not contents.tagged:
        lines.append("attention_loss: null # no tagged nouns: text alone (data import brings tags and masks)")
    lines += ["training:", f"  output_dir: {json.dumps(options.run)}"]
    if not gpus:
        lines.append("  use_cpu: true")
    elif whole and gpus > 1:
        lines.append("  deepspeed: configs/deepspeed/zero3.json # divides weights, gradients and optimizer")
    if gpus:
        lines += ["  bf16: true", "  gradient_checkpointing: true # or a step's activations would not fit"]
    lines += [
        "  per_device_train_batch_size: 1",
        f"  gradient_accumulation_steps: {accumulate} # {accumulate * max(gpus, 1)} samples a step",
        f"  learning_rate: {'1e-4 # adapters take more than weights' if gpus and not whole else '2e-5'}",
        "  lr_scheduler_type: cosine",
        "  warmup_steps: 0.03 # share of all steps",
        f"  num_train_epochs: {epochs} # about {steps} steps",
        f"  logging_steps: {min(10, every)}",
        "  save_strategy: steps",
        f"  save_steps: {min(500, every)}",
        "  save_total_limit: 2",
        f"  dataloader_num_workers: {4 if gpus else 1}",
    ]
    if options.eval is not None:
        lines += ["  eval_strategy: steps", f"  eval_steps: {every}"]
    return "\n".join(lines) + "\n"


def _source(path: str, media: str | None, first: str, rest: str) -> list[str]:
    lines = [f"{first}path: {json.dumps(path)}"]
    return lines + ([f"{rest}media: {json.dumps(media)}"] if media else [])
