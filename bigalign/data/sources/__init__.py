"""Data sources: random access to samples, from webdataset tars to glyphs that are drawn."""
