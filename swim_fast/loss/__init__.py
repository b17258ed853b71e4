"""Attention maps to numbers: the mask loss and the grounding metrics."""
