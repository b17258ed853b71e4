"""VideoRefer to NL-Refer: placeholders become referring expressions with a tagged noun; variants and counts of sets."""
