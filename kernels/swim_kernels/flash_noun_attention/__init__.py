"""Attention output and noun maps from one autograd node, around a flash attention that is already there."""

from swim_kernels.flash_noun_attention.api import check_providers, flash_noun_attention
from swim_kernels.flash_noun_attention.providers.base import Unsupported

__all__ = ["Unsupported", "check_providers", "flash_noun_attention"]
