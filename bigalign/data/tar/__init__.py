"""Webdataset tars: the index, samples by number, sidecars, statistics, remote blocks."""
