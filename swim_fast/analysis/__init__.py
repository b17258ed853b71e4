"""Measure the attention that words of a referring expression pay to its object, by kind of word and layer."""
