"""Grid prediction: from attention maps of several layers to the min-max normalised prediction of each pair's frame."""

from swim_kernels.grid_prediction.api import grid_prediction
from swim_kernels.grid_prediction.reference import FUSIONS, floor_of, log_fused

__all__ = ["FUSIONS", "floor_of", "grid_prediction", "log_fused"]
