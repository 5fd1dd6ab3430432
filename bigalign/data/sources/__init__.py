"""Sources: objects with __len__ and __getitem__(i) -> record."""
