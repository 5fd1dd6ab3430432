"""The id of a sample."""

from __future__ import annotations

import hashlib


def sample_id(key: str) -> int:
  """Returns 64 bits of a hash of a sample's key: equal in every store, wherever its shards are."""
  return int.from_bytes(
    hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
  )
