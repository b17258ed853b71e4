"""A checkpoint and a clip to an answer and maps."""
