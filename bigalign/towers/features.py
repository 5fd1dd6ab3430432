"""The tower of vectors that another program made: its input is its output."""

from __future__ import annotations

import flax.linen as nn
import jax

from bigalign.data.stores import reader
from bigalign.towers import base


class Features(nn.Module):
  """See `features`."""

  width: int
  tokens: int = 0

  @property
  def row(self) -> tuple[int, ...]:
    """Shape of what is stored of one image or text: (D,), or (1 + T, D)."""
    return reader.row_shape(dict(width=self.width, tokens=self.tokens))

  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None, train: bool = False
  ) -> base.TowerOutput:
    """Never called: the model takes stored vectors past its towers."""
    raise ValueError(
      f"a tower 'features' takes stored vectors, [B, {self.width}], and got {x.dtype} {x.shape}:"
      " nobody here can embed anything new"
    )


def features(*, width: int, tokens: int = 0) -> Features:
  """The place of a tower whose vectors come from a store (config.data.stores), made elsewhere.

  Args:
    width: D of the vectors.
    tokens: how many a row of the store holds behind its pooled vector; 0: rows are [D].
  """
  return Features(width, tokens)
