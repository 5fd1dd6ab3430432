"""Writes a run as a folder that other libraries load: `bigalign export`."""
