"""Losses with layers of their own, one file each: captions, self-distillation, tokens."""
