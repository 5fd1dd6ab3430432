"""Host batches, made ahead in worker processes."""
