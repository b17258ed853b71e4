"""Grid prediction: from attention maps of several layers to the min-max normalised prediction of each pair's frame."""

from swim_kernels.grid_prediction.api import grid_prediction

__all__ = ["grid_prediction"]
