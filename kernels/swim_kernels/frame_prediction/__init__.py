"""Frame prediction: from attention maps of several layers to the min-max normalised prediction of each pair's frame."""

from swim_kernels.frame_prediction.dispatch import frame_prediction

__all__ = ["frame_prediction"]
