"""What the ops take: rows of nouns, pairs of row and patch, packed masks."""
