"""The logit matrices of a global batch: formed in tiles, exchanged over the mesh, in bounded memory."""
