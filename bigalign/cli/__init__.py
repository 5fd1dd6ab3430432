"""The command line itself: help, the list of configs, the reference of the options."""
