"""Triton kernels of noun mass: device code, launches, the table of the sets."""
