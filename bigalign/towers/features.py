"""The tower of precomputed vectors from a store."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from bigalign.data.stores import reader
from bigalign.towers import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesOptions:
  """The options of a side whose vectors another program computed, in config.data.stores.

  Args:
    width: width D of the vectors.
    tokens: number of tokens T after the pooled vector in each row of the store; 0: rows are [D].
  """

  width: int
  tokens: int = 0

  @property
  def row_shape(self) -> tuple[int, ...]:
    """Shape of the stored vectors of one image or text: (D,) or (1 + T, D)."""
    return reader.row_shape(dict(width=self.width, tokens=self.tokens))

  @property
  def token_width(self) -> int:
    """D, the width of the vectors."""
    return self.width

  def build(self) -> Features:
    """The tower with these options."""
    return Features(self)


class Features(nn.Module):
  """A tower without parameters, for vectors from a store. The model passes them to the projector.

  >>> Features(FeaturesOptions(width=384)).options.row_shape
  (384,)

  Args:
    options: see FeaturesOptions.
  """

  options: FeaturesOptions

  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None, train: bool = False
  ) -> base.TowerOutput:
    """Raises ValueError: this tower cannot embed images or texts."""
    raise ValueError(
      f"a tower 'features' takes stored vectors, [B, {self.options.width}], and got"
      f" {x.dtype} {x.shape}: it cannot embed anything new. Evaluators read stores: image_store,"
      " text_store or class_store of config.evals"
    )
