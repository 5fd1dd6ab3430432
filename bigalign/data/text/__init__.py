"""Text: the choice of captions, and tokenizers."""
