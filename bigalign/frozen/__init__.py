"""Pairs of frozen towers: embed, compare, curate."""
