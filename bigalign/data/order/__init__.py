"""Which sample of a source is at which position of the training stream."""
