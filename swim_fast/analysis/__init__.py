"""Which words of a referring expression look at the object: nouns, attributes and function words, by layer."""
