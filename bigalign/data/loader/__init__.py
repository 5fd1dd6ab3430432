"""Batches of this host: made ahead, in worker processes."""
