"""Grid prediction: from attention maps of several layers to the prediction of each pair's patch."""

from swim_kernels.grid_prediction.api import grid_metrics, grid_prediction
from swim_kernels.grid_prediction.reference import FUSIONS, floor_of, log_fused

__all__ = ["FUSIONS", "floor_of", "grid_metrics", "grid_prediction", "log_fused"]
