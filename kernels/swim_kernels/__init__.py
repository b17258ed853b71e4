"""Kernels of swim-fast: ops on tensors that know nothing of models, data or training."""

from swim_kernels.compilation import compile_in_background
from swim_kernels.flash_noun_attention import Unsupported, flash_noun_attention
from swim_kernels.grid_prediction import grid_metrics, grid_prediction
from swim_kernels.mask_bce import mask_bce
from swim_kernels.noun_attention import NounQueries, noun_attention
from swim_kernels.noun_mass import noun_mass
from swim_kernels.structs.grid_pairs import GridPairs
from swim_kernels.structs.packed_masks import PackedMasks

__all__ = [
    "GridPairs",
    "NounQueries",
    "PackedMasks",
    "Unsupported",
    "compile_in_background",
    "flash_noun_attention",
    "grid_metrics",
    "grid_prediction",
    "mask_bce",
    "noun_attention",
    "noun_mass",
]
