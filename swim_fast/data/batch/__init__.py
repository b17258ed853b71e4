"""Samples to batches: mixture, packing, collation."""
