"""One record to one training sample."""
