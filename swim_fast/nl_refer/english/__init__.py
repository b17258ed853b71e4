"""English nouns and their phrases."""
