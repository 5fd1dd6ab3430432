"""What the fields of a sample mean, and why a sample is rejected."""
