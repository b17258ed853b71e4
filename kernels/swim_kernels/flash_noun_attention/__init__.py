"""Attention output and noun maps from one autograd node, around a flash attention that is already there."""

from swim_kernels.flash_noun_attention.node import flash_noun_attention, flash_noun_attention_refusal

__all__ = ["flash_noun_attention", "flash_noun_attention_refusal"]
