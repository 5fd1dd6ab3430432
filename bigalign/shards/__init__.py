"""Programs for shards: index, inspect, view, convert."""
