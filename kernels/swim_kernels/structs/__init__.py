"""Inputs of the ops: rows of nouns, pairs of row and patch, packed masks."""
