"""What this machine does: a training step, the loader, embedding and an evaluation, measured."""
