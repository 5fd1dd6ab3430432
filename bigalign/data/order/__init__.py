"""Which sample is at a position: pure functions."""
