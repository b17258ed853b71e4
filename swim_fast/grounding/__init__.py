"""What the noun attention does: metrics and heatmaps."""

from swim_fast.loss.metrics import METRICS, grounding_means, grounding_sums

__all__ = ["METRICS", "grounding_means", "grounding_sums"]
