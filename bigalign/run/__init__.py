"""What surrounds a run: devices, flags, folder, provenance, preemption, timing, metrics."""
