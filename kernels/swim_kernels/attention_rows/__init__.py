"""Softmax rows of a few query tokens, recomputed: what the ops that read them out share, maps and masses alike."""
