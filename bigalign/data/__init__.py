"""From shards to host batches, with numpy and without JAX.

A batch is a pure function of the seed and the position in the training stream. The packages import
each other in one direction: files, samples, then image, tar and stores, then sources, then order
and text, then loader.
"""
