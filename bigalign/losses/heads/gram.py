"""Patches keep the similarities to each other that another model's patches have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses.base import Loss
from bigalign.losses.heads.base import Head, Read, mean_loss
from bigalign.sphere import unit

OF = ("tower", "projector")


def gram_mse(
  tokens: jax.Array,
  teacher: jax.Array,
  normalise: bool = True,
  keep_negative: bool = True,
) -> jax.Array:
  """[b]: the sum over all pairs of patches of the squared difference of their products.

  Args:
    tokens: [b, N, D].
    teacher: [b, N, any width]; it gets no gradient.
    normalise: whether products are cosines.
    keep_negative: False: negative products of both count as 0.
  """
  grams = []
  for x in (tokens, jax.lax.stop_gradient(teacher)):
    x = unit(x) if normalise else x
    gram = jnp.einsum("bnd,bmd->bnm", x, x)
    grams.append(gram if keep_negative else jnp.maximum(gram, 0))
  return ((grams[0] - grams[1]) ** 2).sum((1, 2))


def gram(*, of: str = "tower", normalise: bool = True, keep_negative: bool = True) -> Loss:
  """The Gram term of DINOv3, https://arxiv.org/abs/2508.10104, and of the release of dino.txt.

  The mean over images and pairs of patches of the squared difference between the cosine of two
  patches and the cosine that a teacher gives them. It keeps local features while a global loss
  trains the tower, or while the projector `blocks` learns.

  Args:
    of: "tower": patches of the tower, against those of the averaged tower. With
      config.twin.decay=1, that is the tower at the start of the run. "projector": patches of the
      projector `blocks`, against those of the tower, as in dino.txt.
    normalise: whether patches are compared by cosine; False: by product.
    keep_negative: whether negative products count; DINOv3 offers to set them to 0.
  """
  checks.known("config.loss.gram.of", of, OF)

  def apply_head(params: Any, averaged: Any, read: Read) -> dict[str, jax.Array]:
    own = read.features["tokens_img"]
    if of == "tower":
      teacher = read.image(read.batch["image"], averaged=True).tokens
    else:
      teacher, own = own, read.projected()
    wide = jnp.promote_types(own.dtype, jnp.float32)
    total = gram_mse(own.astype(wide), teacher.astype(wide), normalise, keep_negative)
    return {"sum": total, "count": jnp.full(len(own), own.shape[1] ** 2, jnp.int32)}

  head = Head(
    lambda key, read: {},
    apply_head,
    fields=frozenset({"image"}),
    averages=of == "tower",
  )
  return Loss(frozenset(), lambda sizes: ({}, {}), mean_loss, pair=False, head=head)
