"""The trainer and the run: losses to checkpoint."""
