"""Losses as plain functions, for models with captioning or region heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign.losses.engine.pairwise import DEFAULT, Engine
from bigalign.losses.feature_distill import distance
from bigalign.losses.texts import masked_mean


def cloc_region(
  regions: jax.Array,
  phrases: jax.Array,
  mask: jax.Array,
  phrase_id: jax.Array,
  scale: jax.Array,
  *,
  engine: Engine = DEFAULT,
) -> tuple[jax.Array, jax.Array]:
  """Contrast of image regions and their phrases, after CLOC (https://arxiv.org/abs/2410.02746).

  InfoNCE over all real regions of the global batch. Where the paper does not define it, the
  definition is our own: phrases equal to the anchor's are not its negatives, and means are over
  real regions. The weight of the loss and the grounding head are left to the caller.

  Args:
    regions: [B, M, D], unit norm, at most M regions per image.
    phrases: [B, M, D], unit norm.
    mask: [B, M], nonzero for a real region.
    phrase_id: [B, M] integers, equal for equal phrases.
    scale: [], of the logits.
    engine: forms the logits.

  Returns:
    [], the loss of regions to phrases, and [], of phrases to regions; CLOC uses their mean.

  Example:
    >>> z, ids = jnp.eye(4)[:, None], jnp.arange(4)[:, None]  # one region per image
    >>> r2t, t2r = cloc_region(z, z, jnp.ones((4, 1)), ids, jnp.asarray(1.0))
    >>> round(float(r2t), 3)
    0.744
  """
  zr, zp = (rearrange(x, "b m d -> (b m) d") for x in (regions, phrases))
  real, ids = (rearrange(x, "b m -> (b m)") for x in (mask != 0, phrase_id))
  both = {"positive": engine.paired(zr, zp), "real": real, "id": ids}

  def tile(row, col, shared):
    z = engine.products(row["z"], col["z"])
    other = row["real"][:, None] & col["real"][None, :] & (row["id"][:, None] != col["id"][None, :])
    # Relative to the positive: absolute logits would lose the loss to rounding, in 100 - 100.
    i2t, t2i = z - row["positive"][:, None], z - col["positive"][None, :]
    scale = shared["scale"]
    return {k: jnp.where(other, scale * v, -jnp.inf) for k, v in (("r2t", i2t), ("t2r", t2i))}

  lse = engine.reduce(
    tile,
    {"z": zr, **both},
    {"z": zp, **both},
    {"scale": scale},
    outputs={"r2t": "row_lse", "t2r": "col_lse"},
  )
  count = jnp.maximum(real.sum(), 1)
  r2t, t2r = (jnp.where(real, jax.nn.softplus(lse[k]), 0).sum() / count for k in ("r2t", "t2r"))
  return r2t, t2r


def token_distill(
  tokens: jax.Array, teacher: jax.Array, mask: jax.Array | None = None, *, kind: str = "cosine"
) -> jax.Array:
  """[]: regression of tokens to a teacher's tokens at the same places.

  As EVA (https://arxiv.org/abs/2211.07636) on masked patches and MaskEmbed
  (https://arxiv.org/abs/2410.11087) on all. The mean over all tokens of the global batch that
  count, not a mean of means.

  Args:
    tokens: [B, N, D].
    teacher: [B, N, D]; it gets no gradient.
    mask: [B, N], nonzero for tokens that count; None: all.
    kind: "cosine", "mse" or "cosine+mse", see feature_distill.distance.

  Example:
    >>> x = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    >>> float(token_distill(x, 2 * x)), float(token_distill(x, 2 * x, kind="mse"))
    (0.0, 0.25)
  """
  each = distance(tokens, teacher, kind)  # [B, N]
  return each.mean() if mask is None else masked_mean(each, mask != 0)
