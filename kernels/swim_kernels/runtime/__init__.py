"""Parts that the ops share: choice of a backend, launches, numerics, moving tensors."""

from swim_kernels.runtime.backends import find_triton_obstacle
from swim_kernels.runtime.numerics import exact_product, interpolation, no_autocast, to_autocast_dtype
from swim_kernels.runtime.transfer import move_together, pin_together

__all__ = [
    "exact_product",
    "find_triton_obstacle",
    "interpolation",
    "move_together",
    "no_autocast",
    "pin_together",
    "to_autocast_dtype",
]
