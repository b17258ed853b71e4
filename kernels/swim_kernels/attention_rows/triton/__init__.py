"""Triton kernels of the rows: device code, tables of a batch, tiles, launches."""
