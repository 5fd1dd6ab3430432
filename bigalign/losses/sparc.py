"""Patches grouped by the words that they show, told apart within each pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
  """Sparse fine-grained contrast, https://arxiv.org/abs/2401.09865, beside CLIP's loss.

  Each token of a text takes the patches of its own image that resemble it most, and their mean must
  be nearer to it than to the other tokens of the same text, and the reverse. The towers' tokens
  tokens_img [B, P, D] and tokens_txt [B, L, D] are compared as they are: no class token, equal
  width. Tokens where mask_txt [B, L] is False take no part; means are over the whole batch.

  Args:
    t_init, t_max: first and largest logit scale, of both terms, as in `clip`.
    w_global, w_fine: weights of CLIP's loss and of the fine term; 0.5 and 1 from the paper as we
      remember it.
    threshold: of the similarities, scaled to [0, 1] over the patches, those that count; None: 1/P,
      as in the paper. Other implementations tried 0.3.
  """
  if threshold is not None and not 0 <= threshold <= 1:
    raise ValueError(f"config.loss.sparc.threshold={threshold} must be between 0 and 1")

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
        f" and tokens_txt {tokens.shape[2]}: give config.model.image and config.model.text the same"
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
  """Both directions of the fine term, each a mean over all real tokens of the batch.

  Args:
    patches, tokens: [B, P, D], [B, L, D]; any length.
    mask: [B, L] bool, True for a real token.
    scale: [] of the logits.
    threshold: see `sparc`.

  Returns:
    [] grouped patches among tokens, [] tokens among grouped patches.
  """
  precision = jax.lax.Precision.HIGHEST
  alike = jnp.einsum("bld,bpd->blp", tokens, patches, precision=precision)
  low, high = (f(alike, -1, keepdims=True) for f in (jnp.min, jnp.max))
  # Where all patches are alike there is nothing to choose: no patch is taken.
  alike = (alike - low) / jnp.maximum(high - low, 1e-8)
  alike = jnp.where(alike < threshold, 0, alike)
  weights = alike / jnp.maximum(alike.sum(-1, keepdims=True), 1e-8)
  grouped = unit(jnp.einsum("blp,bpd->bld", weights, patches, precision=precision))
  tokens = unit(tokens)
  cosine = jnp.einsum("bld,bud->blu", grouped, tokens, precision=precision)
  own = jnp.sum(grouped * tokens, -1, keepdims=True)
  seen = mask[:, None, :] | jnp.eye(mask.shape[1], dtype=bool)[None]

  def loss(cosine: jax.Array) -> jax.Array:
    # Relative to the positive, which is among them with 0.
    each = jax.nn.logsumexp(jnp.where(seen, scale * (cosine - own), -jnp.inf), -1)  # [B, L]
    return jnp.sum(jnp.where(mask, each, 0)) / jnp.maximum(mask.sum(), 1)

  return loss(cosine), loss(jnp.swapaxes(cosine, 1, 2))
