"""Installed packages and chosen implementations: versions, GPU, backends of ops, providers of flash attention."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import subprocess

import torch

from benchmarks.core import read_cpu_model
from benchmarks.gpu.checks import FAIL, PASS, SKIP, CheckLog, Options
from benchmarks.gpu.report import MACHINE
from swim_kernels.flash_noun_attention import check_providers

PACKAGES = ("torch", "triton", "transformers", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")
OPS = ("noun_attention", "noun_mass", "grid_prediction", "mask_bce")


def run(options: Options, log: CheckLog) -> None:
    machine = describe(options.device)
    (options.output / MACHINE).write_text(json.dumps(machine, indent=1), encoding="utf-8")
    on_gpu = options.device == "cuda"
    if on_gpu:
        with log.judge("a GPU of compute capability 8.0 or later") as detail:
            capability = torch.cuda.get_device_capability()
            detail.append(f"{machine['gpu']}, sm_{10 * capability[0] + capability[1]}")
            assert capability >= (8, 0), f"compute capability {capability}"
    for name in OPS:
        with log.judge(f"{name} runs on {'triton' if on_gpu else 'torch'} by itself"):
            op = importlib.import_module(f"swim_kernels.{name}.api").OP
            chosen, reason = op.choose("auto", options.device), op.refuse_triton(options.device)
            assert chosen == ("triton" if on_gpu else "torch"), f"auto falls back to {chosen}: {reason}"
    auto, obstacles = check_providers(options.device)
    for name, obstacle in obstacles.items():
        failed = FAIL if name == auto else SKIP
        log.add(f"flash attention {name}", failed if obstacle else PASS, obstacle or "")
    if on_gpu:
        with log.judge("attention that sdpa chooses") as detail:
            detail.append(choose_sdpa())


def choose_sdpa() -> str:
    """Return the backend that torch's attention takes for a causal bf16 layer of a 7B model."""
    from torch.nn.attention import SDPBackend

    query, key = (torch.zeros(1, heads, 4096, 128, dtype=torch.bfloat16, device="cuda") for heads in (28, 28))
    number = torch._fused_sdp_choice(query, key, key, is_causal=True)
    names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
    return names.get(int(number), f"backend {int(number)}")


def describe(device: str) -> dict[str, object]:
    """Return versions and hardware."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cpu"] = read_cpu_model()
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "sms": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": read_driver(),
        }
    return found


def read_driver() -> str | None:
    """Return the driver's version and the clocks' limits, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
