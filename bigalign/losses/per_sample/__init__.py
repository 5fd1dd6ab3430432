"""Losses with state for every sample of the dataset."""
