"""Record files: index, records, tags, masks, and what is wrong with them."""
