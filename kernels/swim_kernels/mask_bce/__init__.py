"""Mask BCE: predictions on coarse grids against masks of many pixels, without the upsampled prediction."""

from swim_kernels.mask_bce.api import mask_bce
from swim_kernels.mask_bce.reference import MARGIN

__all__ = ["MARGIN", "mask_bce"]
