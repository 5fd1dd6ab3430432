"""Why a sample cannot be used: counted in every batch, never silent."""

from __future__ import annotations

# A column of batch["rejects"] each, in this order; append only, it is a public format.
REASONS = (
    "no_image",      # the sample has no member with a known image extension
    "empty",         # the image has no bytes
    "truncated",     # the image ends too early
    "undecodable",   # not an image, or a broken one
    "too_large",     # more pixels than max_pixels
    "no_caption",    # none of the caption fields is there and not blank
    "bad_metadata",  # a .json or .cls member that cannot be read
)


class Rejected(Exception):
  """This sample cannot be used, for a reason out of REASONS."""

  def __init__(self, reason: str, detail: str = ""):
    if reason not in REASONS:
      raise ValueError(f"Unknown reject reason {reason!r}; known: {REASONS}")
    super().__init__(reason, detail)
    self.reason = reason
    self.detail = detail

  def __str__(self) -> str:
    return f"{self.reason}: {self.detail}" if self.detail else self.reason
