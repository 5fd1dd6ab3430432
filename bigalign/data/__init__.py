"""From shards to host batches: numpy only, no JAX call, a pure function of (seed, position)."""
