"""Embedding stores: written, read, and joined with one side of each pair."""
