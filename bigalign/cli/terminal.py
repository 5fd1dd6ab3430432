"""The width of the terminal."""

from __future__ import annotations

import shutil


def columns(most: int = 120) -> int:
  """Characters of a line of text; longer lines than `most` are hard to read."""
  return max(min(shutil.get_terminal_size().columns, most), 40)
