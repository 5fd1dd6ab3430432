"""Suites of evaluation tasks: one table for several models, with kept embeddings and results."""
