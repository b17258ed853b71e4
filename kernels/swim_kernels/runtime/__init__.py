"""What the ops share: choice of a backend, launches, numerics."""

from swim_kernels.runtime.numerics import exact_product, interpolation, no_autocast

__all__ = ["exact_product", "interpolation", "no_autocast"]
