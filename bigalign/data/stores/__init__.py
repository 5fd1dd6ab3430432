"""Embedding stores: written, read, and combined with a source for one side of each pair."""
