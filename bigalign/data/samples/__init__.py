"""The parts of a sample: its id, members and columns, and why it is rejected."""
