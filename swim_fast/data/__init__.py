"""From files to batches: records, masks, video, sampling, tags, samples, collation."""
