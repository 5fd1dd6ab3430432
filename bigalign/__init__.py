"""Contrastive image-text training in JAX."""
