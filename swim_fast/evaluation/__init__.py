"""Answers and attention of a checkpoint on benchmarks: VideoRefer-Bench Q and D, and grounding on annotated sets."""
