"""The id of a sample."""

from __future__ import annotations

import hashlib


def sample_id(key: str) -> int:
  """Returns 64 bits of a hash of a sample's key: equal in every store, wherever its shards are."""
  try:
    data = key.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:  # half a surrogate pair, from JSON
    data = key.encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def class_key(number: int, name: str) -> str:
  """Returns the key of a class in a store of prompts; classes may share a name."""
  return f"class {number}: {name}"
