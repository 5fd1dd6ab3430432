"""Webdataset shards: headers, index, sidecars, remote blocks."""
