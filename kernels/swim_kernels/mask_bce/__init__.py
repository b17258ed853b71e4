"""Mask BCE: predictions on coarse grids against masks of many pixels, without the upsampled prediction."""

from swim_kernels.mask_bce.api import mask_bce

__all__ = ["mask_bce"]
