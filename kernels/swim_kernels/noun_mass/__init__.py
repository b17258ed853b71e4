"""Noun mass: how much of its attention a query token pays to sets of keys, by head, without an attention map."""

from swim_kernels.noun_mass.api import noun_mass
from swim_kernels.structs.noun_queries import NounQueries

__all__ = ["NounQueries", "noun_mass"]
