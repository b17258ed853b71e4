"""Noun attention: the head-averaged attention probabilities of a few query tokens, without the attention matrix."""

from swim_kernels.noun_attention.api import noun_attention
from swim_kernels.structs.noun_queries import NounQueries

__all__ = ["NounQueries", "noun_attention"]
