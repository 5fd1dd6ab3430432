"""Memory, communication and cost of a config on a TPU slice, by ahead-of-time compilation."""
