"""Search in the embeddings of a dataset: by text, by image, and for neighbours of a result."""
