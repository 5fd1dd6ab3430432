"""The kinds of the texts of an image, in the field texts_kind of a batch."""

from __future__ import annotations

ABSENT, POSITIVE, NEGATIVE = range(3)
