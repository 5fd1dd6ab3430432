"""Contrast of phrases and images by the patches that a phrase attends to (RadZero)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.texts import masked_mean, negatives, of_batch
from bigalign.sphere import unit


def attended(
  tokens: jax.Array, phrases: jax.Array, scale: jax.Array, *, engine: Engine
) -> jax.Array:
  """[n, m]: the cosine of each phrase and the tokens of each image that it attends to.

  Args:
    tokens: [n, N, D], unit norm.
    phrases: [m, D], unit norm.
    scale: [], of the softmax of a phrase over the tokens of an image.
    engine: forms the products.
  """
  n, size = tokens.shape[:2]
  cosines = engine.products(rearrange(tokens, "n k d -> (n k) d"), phrases)
  cosines = rearrange(cosines, "(n k) m -> n m k", n=n, k=size)
  weights = jax.nn.softmax(scale * cosines, -1)
  # One product with the weights for each image, as large as that of the cosines.
  pooled = jnp.einsum("nmk,nkd->nmd", weights, tokens, precision=jax.lax.Precision.HIGHEST)
  square = jnp.sum(pooled * pooled, -1)
  small = square < 1e-24
  length = jnp.where(small, 1, jnp.sqrt(jnp.where(small, 1, square)))
  return jnp.where(small, 0, jnp.sum(weights * cosines, -1) / length)


def radzero(*, t_init: float = 1 / 0.07, t_max: float | None = 100.0, eps: float = 1e-8) -> Loss:
  """Phrases find images by their patches, and back: RadZero, https://arxiv.org/abs/2504.07416.

  A phrase's logit for an image is the scaled cosine of the phrase and of those patches of the image
  that it attends to; one learned scale is used for both. "row" is the loss of a phrase that
  chooses an image; "col" that of an image that chooses one of its phrases among those of other
  images, so that its own phrases do not compete. Both are means over phrases, with the eps of the
  release in the ratio and in its logarithm, and are computed as logarithms. Phrases are the texts
  of an image, ztxts [B, M, E] with texts_kind [B, M]; the patches are tokens_img [B, N, E], which
  must be as wide. Hard negatives are phrases that belong to no image.

  Args:
    t_init: first value of the logit scale, as in `clip`; 1 / 0.07 in the release.
    t_max: upper bound of the logit scale, as in `clip`.
    eps: added to the denominators, and to the probabilities before the logarithm.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # each image has one patch, and one phrase
    >>> feats = {"tokens_img": z[:, None], "ztxts": jnp.stack([z, z], 1)}
    >>> metrics = apply_once(radzero(t_init=1.0), feats, {"texts_kind": jnp.asarray([[1, 0]] * 4)})
    >>> round(float(metrics["row"]), 3), round(float(metrics["col"]), 3)
    (0.744, 0.744)
  """
  temperature.check("radzero", t_init, t_max)
  checks.above_zero("config.loss.radzero", eps=eps)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    scale, texts = jnp.exp(params["t"]), of_batch(feats, batch)
    phrases, tokens = unit(texts.z), unit(feats["tokens_img"].astype(texts.z.dtype))
    if tokens.shape[-1] != phrases.shape[-1]:
      raise ValueError(
        f"config.loss.radzero compares patches and texts, but tokens_img are {tokens.shape[-1]}"
        f" wide and ztxts {phrases.shape[-1]}; set config.model.embed_dim to the width of the"
        " image tower"
      )
    # A pair has three arrays in a tile: two of N numbers, one of D.
    numbers = 2 * tokens.shape[1] + tokens.shape[2]
    engine = dataclasses.replace(context.engine, tile_mb=context.engine.tile_mb / numbers)

    def tile(row, col, shared):
      logits = shared["scale"] * attended(row["z"], col["z"], shared["scale"], engine=engine)
      mine = texts.owned(row, col)
      return {
        "images": jnp.where(mine, -jnp.inf, logits),
        "phrases": jnp.where(negatives(row, col, texts.per_image), logits, -jnp.inf),
        "own": jnp.where(mine, logits, 0),
      }

    lse = engine.reduce(
      tile,
      {"z": tokens},
      {**texts.columns(), "z": phrases},
      {"scale": scale},
      outputs={"images": "col_lse", "phrases": "row_lse", "own": "col_sum"},
    )
    own, images = (texts.of_image(lse[k]) for k in ("own", "images"))  # [B, M]
    floor = math.log(eps)

    def loss_of(others: jax.Array) -> jax.Array:
      # -log(p + eps), where log p = -softplus(log(exp(others) + eps) - own).
      log_p = -jax.nn.softplus(jnp.logaddexp(others, floor) - own)
      return masked_mean(-jnp.logaddexp(log_p, floor), texts.positive)

    row, col = loss_of(images), loss_of(jnp.broadcast_to(lse["phrases"][:, None], own.shape))
    loss = (row + col) / 2
    return loss, (state, {"loss": loss, "row": row, "col": col, "logit_scale": scale})

  needs = frozenset({"texts", "tokens_image"})
  return Loss(needs, init, apply, temperature.clamped(t_max))
