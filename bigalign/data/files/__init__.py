"""Files, local and remote: storage, patterns, fingerprints, the cache, pools of processes."""
