"""Liger's Triton kernels in the modules of one model.

Liger's own `apply_liger_kernel_to_…` functions set names in transformers' modules, which changes every model of the
process, and its rotary embedding takes a name there that transformers 5.17 does not call. Here only the `forward` of
this model's own modules is replaced. Each reads its weights in its own call, where ZeRO-3 has them gathered, and calls
its submodules as before, so that adapters work. The state, and what is saved, stays the same.
"""

import functools
import importlib.metadata
import inspect
import logging
import types
from collections import Counter
from collections.abc import Callable

import torch
from packaging.version import Version
from torch import Tensor, nn

from swim_fast.families import get_attentions, get_family

logger = logging.getLogger(__name__)

VERSIONS = ("0.8.5", "0.9")  # from, and below

_ROTARY = "apply_rotary_pos_emb"  # called by the decoder's attention, a global of its modeling file


def get_refusal(device_type: str) -> str | None:
    """Return the reason why Liger's kernels cannot be used on a type of device, None if they can."""
    if device_type != "cuda":
        return f"its kernels need CUDA, and the model is on {device_type}"
    version = _installed_version()
    if version is None:
        return f"liger-kernel is not installed: pip install 'liger-kernel>={VERSIONS[0]},<{VERSIONS[1]}'"
    if not Version(VERSIONS[0]) <= Version(version) < Version(VERSIONS[1]):
        return f"liger-kernel is {version}, and must be at least {VERSIONS[0]} and below {VERSIONS[1]}"
    return None


@functools.cache
def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


def apply_liger(model: nn.Module, device: torch.device | str) -> list[str]:
    """Let Liger compute RMSNorm, SwiGLU and the rotary embedding of a model; one log line lists what it computes.

    In the vision tower (with its merger) only the first two: its rotary embedding works in fp32 on another layout, so
    that Liger's would copy as much as it saves.

    Args:
        model: a stock `…ForConditionalGeneration` of a supported family, before adapters wrap parts of it.
        device: where the model is going to run. Not CUDA, or without liger-kernel: nothing is replaced.

    Returns:
        The replaced parts, as "language model: RMSNorm × 57"; empty if nothing was replaced.

    Raises:
        UnsupportedModelError: no entry for the model's family.
    """
    family = get_family(model)
    reason = get_refusal(torch.device(device).type)
    if reason:
        logger.info("Liger is not used: %s", reason)
        return []
    found: Counter[str] = Counter()
    for part, path in (("language model", family.language_model), ("vision tower", family.visual)):
        for module in model.get_submodule(path).modules():
            if _is_rms_norm(module):
                name, module.forward = "RMSNorm", types.MethodType(_rms_norm, module)
            elif _is_swiglu(module):
                name, module.forward = "SwiGLU", types.MethodType(_swiglu, module)
            else:
                continue
            found[f"{part}: {name}"] += 1
    for module in get_attentions(model):
        forward = _with_rotary(type(module).forward) if module is not None else None
        if forward is not None:
            module.forward = types.MethodType(forward, module)
            found["language model: rotary embedding"] += 1
    if "language model: rotary embedding" not in found:
        logger.warning("Liger's rotary embedding is not used: the attention calls no %s of its own file", _ROTARY)
    replaced = [f"{what} × {count}" for what, count in found.items()]
    logger.info("Liger computes: %s", ", ".join(replaced))
    return replaced


def remove_liger(model: nn.Module) -> None:
    """Undo `apply_liger`."""
    for module in model.modules():
        function = getattr(vars(module).get("forward"), "__func__", None)
        if function in (_rms_norm, _swiglu) or getattr(function, "__globals__", {}).get(_ROTARY) is _rotary:
            del module.forward


def _is_rms_norm(module: nn.Module) -> bool:
    # normalisations that multiply by 1 + weight call this field eps
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_swiglu(module: nn.Module) -> bool:
    from transformers.activations import SiLUActivation

    projections = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    silu = isinstance(getattr(module, "act_fn", None), (nn.SiLU, SiLUActivation))
    return silu and all(isinstance(projection, nn.Module) for projection in projections)


def _rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    # weight · (x / rms).to(dtype) as in Llama; the gradient in a tensor of its own: the incoming one may be shared
    return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False, None)


def _swiglu(self: nn.Module, hidden_states: Tensor) -> Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    gated = LigerSiLUMulFunction.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states))
    return self.down_proj(gated)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Plain rotary embedding of q `[B, Hq, L, D]` and k `[B, Hkv, L, D]` with cos and sin `[B, L, D]`.

    Not Liger's multimodal one: transformers has already merged time, height and width in cos and sin.
    """
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)


@functools.cache
def _is_plain_rotary(function: Callable | None) -> bool:
    """Return True for the function that `_rotary` stands in for: others turn a part of the head, or pairs of it."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 3, 8, generator=generator)
    cos, sin = torch.randn(2, 1, 3, 4, generator=generator).repeat(1, 1, 1, 2)
    try:
        found = function(q, k, cos, sin)
    except Exception:  # of whatever other signature
        return False
    wanted = (x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin for x in (q, k))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def _with_rotary(forward: types.FunctionType) -> types.FunctionType | None:
    """Return the same function with Liger's rotary embedding, or None if it calls no such one by that name.

    A forward finds its rotary embedding among the globals of its file. A function with the same code and globals of its
    own finds Liger's there; other models of the process keep theirs.
    """
    forward = inspect.unwrap(forward)  # transformers from 5.24 on wraps it, to rename an argument
    if not isinstance(forward, types.FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    if not _is_plain_rotary(forward.__globals__.get(_ROTARY)):
        return None
    names = {**forward.__globals__, _ROTARY: _rotary}
    copied = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__, copied.__qualname__ = forward.__kwdefaults__, forward.__qualname__
    return copied
