"""Kernels of swim-fast: ops on tensors that know nothing of models, data or training."""

from swim_kernels.noun_attention import NounQueries, noun_attention

__all__ = ["NounQueries", "noun_attention"]
