"""TFDS datasets by random access, without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Tfds:
  pass
