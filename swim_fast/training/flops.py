"""Floating-point operations of a training step, for its share of the device's peak (MFU).

Counted are matrix products, 2·m·n·k operations each: every weight with every token it sees, and in attention the scores
and the weighted values. In backward, a product has another one for its input's gradient, if anything before it is
trained, and one for its weight's, if that is; attention has two for each of its two. Causal attention counts the pairs
it looks at, about half of the square. Not counted: recomputation by activation checkpointing, the noun maps, and all
that is not a matrix product.

This is the "model FLOPs utilization" of PaLM (arXiv 2204.02311, appendix B), except that PaLM counts the whole square
of causal attention.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from swim_fast.data.batch.counts import BatchCounts
from swim_fast.families import get_family, get_head_dim

# Dense bf16 peak of one device in TFLOP/s, from the vendors' data sheets (where these give the figure with sparsity,
# half of it). The first one whose words occur in the device's name is taken.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),  # SXM5, "NVIDIA H100 80GB HBM3"
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.05),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L4", 121.0),
    ("MI300X", 1307.4),
)


def get_peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a device in FLOP/s, None for the CPU and for devices not in `PEAK_TFLOPS`."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ")
    return next((1e12 * peak for name, peak in PEAK_TFLOPS if f" {name} " in f" {words} "), None)


class Flops(NamedTuple):
    """Operations of forward and backward."""

    weights: float  # products with weights
    text_attention: float
    vision_attention: float


class StepFlops:
    """Counter of one model's operations on batches.

    Args:
        model: of a supported family, frozen as it will be trained, with or without adapters.
    """

    def __init__(self, model: nn.Module):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        family = get_family(model)
        visual, language_model = model.get_submodule(family.visual), model.get_submodule(family.language_model)
        text, vision = language_model.config, family.vision(model.config)
        mergers = [module for path in family.mergers for module in model.get_submodule(path).modules()]

        # operations per token of each part, in the order of the forward: `trained` if anything so far is
        trained = False
        tower = [module for module in visual.modules() if module not in mergers]
        self._per_patch, trained = _count_products(tower, trained)
        self._per_vision_pair = (3 if trained else 1) * 4 * vision.hidden
        self._per_visual_token, trained = _count_products(mergers, trained)
        embedding = [module for module in language_model.modules() if isinstance(module, nn.Embedding)]
        trained = trained or any(_is_trained(module) for module in embedding)
        self._per_token, self._per_text_pair = 0, 0
        head_dim = get_head_dim(text)
        for layer in language_model.layers:
            products, trained = _count_products(list(layer.modules()), trained)
            self._per_token += products
            self._per_text_pair += (3 if trained else 1) * 4 * text.num_attention_heads * head_dim
        self._per_label, _ = _count_products(list(model.get_submodule(family.head).modules()), trained)

        self._patches_per_cell = vision.patches_per_cell or vision.patches_per_token
        self._depth = vision.depth
        self._whole_frames = vision.depth if vision.full_blocks is None else vision.full_blocks
        self._window = vision.window

    def __call__(self, counts: BatchCounts) -> Flops:
        """Return the operations of one batch's forward and backward, without padding."""
        patches = vision_pairs = 0
        side = round(self._patches_per_cell**0.5)
        for frames, rows, columns in counts.grids:
            height, width = rows * side, columns * side
            patches += frames * height * width
            windows = self._sum_squares(height) * self._sum_squares(width)
            inside = self._whole_frames * (height * width) ** 2 + (self._depth - self._whole_frames) * windows
            vision_pairs += frames * inside
        weights = self._per_token * counts.tokens + self._per_label * counts.labels + self._per_patch * patches
        weights += self._per_visual_token * patches / self._patches_per_cell
        pairs = sum(length * (length + 1) / 2 for length in counts.lengths)
        return Flops(weights, self._per_text_pair * pairs, self._per_vision_pair * vision_pairs)

    def _sum_squares(self, length: int) -> int:
        """Return the sum of squared window lengths over a side of `length` patches."""
        rest = length % self._window
        return (length - rest) * self._window + rest**2


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _count_products(modules: list[nn.Module], trained: bool) -> tuple[int, bool]:
    """Return the operations per token of modules in their order, and if anything up to the last one is trained."""
    total = 0
    for module in modules:
        size = 0  # from the geometry: ZeRO-3 and quantisation leave other shapes in the weights themselves
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            size = module.in_channels * module.out_channels * math.prod(module.kernel_size)
        if size:
            total += 2 * size * (1 + trained + module.weight.requires_grad)
        trained = trained or _is_trained(module)
    return total, trained
