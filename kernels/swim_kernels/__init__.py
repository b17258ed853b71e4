"""Kernels of swim-fast: ops on tensors that know nothing of models, data or training."""

from swim_kernels.flash_noun_attention import flash_noun_attention, flash_noun_attention_refusal
from swim_kernels.noun_attention import NounQueries, noun_attention

__all__ = ["NounQueries", "flash_noun_attention", "flash_noun_attention_refusal", "noun_attention"]
