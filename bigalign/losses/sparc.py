"""Contrast of words and the patches that show them, within each pair (SPARC)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import contrast
from bigalign.sphere import unit


def sparc(
  *,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
  w_global: float = 0.5,
  w_fine: float = 1.0,
  threshold: float | None = None,
) -> Loss:
  """CLIP and a sparse fine-grained contrast: SPARC, https://arxiv.org/abs/2401.09865.

  Each token of a text is grouped with the patches of its own image that are most similar to it. The
  mean of these patches must be closer to the token than to the other tokens of the same text, and
  the reverse. The towers' tokens, tokens_img [B, P, D] and tokens_txt [B, L, D], are compared
  directly: without a class token, and with equal width. Tokens with mask_txt [B, L] False are
  ignored. Means are over the whole batch.

  Args:
    t_init: first value of the logit scale of both terms, as in `clip`.
    t_max: upper bound of that scale, as in `clip`.
    w_global: weight of CLIP's loss; 0.5 in the paper (not checked).
    w_fine: weight of the fine-grained term; 1 in the paper (not checked).
    threshold: least similarity of a grouped patch, where similarities are scaled to [0, 1] over the
      patches; None: 1/P, as in the paper. Other implementations use 0.3.

  Example:
    >>> from bigalign.losses import apply_once
    >>> tokens = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))  # each word has a patch of its own
    >>> feats = {"zimg": jnp.eye(2), "ztxt": jnp.eye(2), "tokens_img": tokens, "tokens_txt": tokens}
    >>> metrics = apply_once(sparc(t_init=1.0), feats)
    >>> round(float(metrics["contrastive_loss"]), 3), round(float(metrics["fine_loss"]), 3)
    (0.313, 0.744)
  """
  temperature.check("sparc", t_init, t_max)
  if threshold is not None:
    checks.between("config.loss.sparc", 0, 1, threshold=threshold)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    scale = jnp.exp(params["t"])
    coarse = contrast(feats["zimg"], feats["ztxt"], scale, engine=context.engine)
    dtype = feats["zimg"].dtype
    patches, tokens = (feats[name].astype(dtype) for name in ("tokens_img", "tokens_txt"))
    if patches.shape[2] != tokens.shape[2]:
      raise ValueError(
        f"config.loss.sparc compares patches and words, but tokens_img are {patches.shape[2]} wide"
        f" and tokens_txt {tokens.shape[2]}; give config.model.image and config.model.text the same"
        " width"
      )
    mask = feats.get("mask_txt", jnp.ones(tokens.shape[:2], bool)).astype(bool)
    least = 1 / patches.shape[1] if threshold is None else threshold
    vl, lv = fine(patches, tokens, mask, scale, least)
    loss = w_global * coarse + w_fine * (vl + lv) / 2
    logs = {"contrastive_loss": coarse, "fine_loss": (vl + lv) / 2, "logit_scale": scale}
    logs |= {"patches_to_token_loss": vl, "token_to_patches_loss": lv}
    return loss, (state, {"loss": loss, **logs})

  return Loss(frozenset({"tokens"}), init, apply, temperature.clamped(t_max))


def fine(
  patches: jax.Array, tokens: jax.Array, mask: jax.Array, scale: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
  """Both directions of the fine-grained term, each a mean over all real tokens of the batch.

  Args:
    patches: [B, P, D], of any norm.
    tokens: [B, L, D], of any norm.
    mask: [B, L] bool, True for a real token.
    scale: [], of the logits.
    threshold: see `sparc`.

  Returns:
    [], the loss of finding a token for its grouped patches, and [], of finding the grouped patches
    for a token.
  """
  precision = jax.lax.Precision.HIGHEST
  similar = jnp.einsum("bld,bpd->blp", tokens, patches, precision=precision)
  low, high = (f(similar, -1, keepdims=True) for f in (jnp.min, jnp.max))
  # If all patches are equally similar, none is chosen.
  similar = (similar - low) / jnp.maximum(high - low, 1e-8)
  similar = jnp.where(similar < threshold, 0, similar)
  weights = similar / jnp.maximum(similar.sum(-1, keepdims=True), 1e-8)
  grouped = unit(jnp.einsum("blp,bpd->bld", weights, patches, precision=precision))
  tokens = unit(tokens)
  cosine = jnp.einsum("bld,bud->blu", grouped, tokens, precision=precision)
  own = jnp.sum(grouped * tokens, -1, keepdims=True)
  candidates = mask[:, None, :] | jnp.eye(mask.shape[1], dtype=bool)[None]

  def loss(cosine: jax.Array) -> jax.Array:
    # Relative to the positive, which is itself a candidate, with 0.
    each = jax.nn.logsumexp(jnp.where(candidates, scale * (cosine - own), -jnp.inf), -1)  # [B, L]
    return jnp.sum(jnp.where(mask, each, 0)) / jnp.maximum(mask.sum(), 1)

  return loss(cosine), loss(jnp.swapaxes(cosine, 1, 2))
