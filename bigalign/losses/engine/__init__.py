"""Forms the logit matrices of a global batch: in tiles, over a mesh, in bounded memory."""
