"""What a loss does to a batch, beyond its value; too dear for every step, worth it now and then."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign.losses.base import Context, Loss
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.per_sample import global_contrastive as gcl
from bigalign.losses.per_sample import tables

QUANTILES = (5, 50, 95)
EDGES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, math.inf)  # of a histogram of temperatures


def diagnose(
  loss: Loss,
  params: Any,
  state: Any,
  feats: Mapping[str, jax.Array],
  batch: Mapping[str, jax.Array],
  context: Context,
) -> dict[str, jax.Array]:
  """Scalars of one batch, from the arguments of `loss.apply`, a weighted sum.

  Returns:
    "hardest_negative/image", "/text": the largest cosine of an image (a text) with another pair's
      text (image), averaged over the batch; "rank_1/image", "/text": share of images (texts) whose
      own text (image) is nearer than that.
    "saturation/image", "/text": share of them whose softmax at the logit scale gives their own more
      than 0.99, so that they hardly teach any more; only where a loss has a logit scale.
    "gradient_share/<term>": of several terms, the norm of each one's weighted gradient with respect
      to the features, divided by the sum of these norms.
    "temperature/image/p5", "/p50", "/p95", "temperature/text/…": quantiles over the batch of
      temperatures that are kept per sample; "temperature/image/0.01-0.02", …: a histogram of them,
      the share of the batch that lies there.
  """
  found = {**_negatives(loss, params, feats, context.engine), **_temperatures(state, batch)}
  if len(loss.terms) > 1:
    norms = {
      name: weight
      * _gradient_norm(term, params.get(name, {}), state.get(name, {}), feats, batch, context)
      for name, (weight, term) in loss.terms.items()
    }
    whole = sum(norms.values())
    found |= {f"gradient_share/{name}": x / whole for name, x in norms.items()}
  return found


def _negatives(
  loss: Loss, params: Any, feats: Mapping[str, jax.Array], engine: Engine
) -> dict[str, jax.Array]:
  zimg, ztxt = (jax.lax.stop_gradient(feats[k]) for k in ("zimg", "ztxt"))
  scales = [jnp.exp(params[name]["t"]) for name in loss.terms if "t" in params.get(name, {})]
  own = engine.paired(zimg, ztxt)

  def tile(row: Any, col: Any, shared: Any) -> dict[str, jax.Array]:
    s = jnp.where(pairwise.same(row, col), -jnp.inf, engine.products(row["z"], col["z"]))
    scale = shared["scale"]
    return {
      "image": s,
      "text": s,
      "image_lse": scale * (s - row["own"][:, None]),
      "text_lse": scale * (s - col["own"][None, :]),
    }

  best = engine.reduce(
    tile,
    {"z": zimg, "own": own},
    {"z": ztxt, "own": own},
    {"scale": scales[0] if scales else jnp.ones(())},
    outputs={"image": "row_max", "text": "col_max", "image_lse": "row_lse", "text_lse": "col_lse"},
  )
  found = {}
  for side in ("image", "text"):
    found[f"hardest_negative/{side}"] = best[side].mean()
    found[f"rank_1/{side}"] = (own > best[side]).mean()
    if scales:
      found[f"saturation/{side}"] = (jax.nn.sigmoid(-best[f"{side}_lse"]) > 0.99).mean()
  return found


def _gradient_norm(
  term: Loss,
  params: Any,
  state: Any,
  feats: Mapping[str, jax.Array],
  batch: Mapping[str, jax.Array],
  context: Context,
) -> jax.Array:
  real = {k: x for k, x in feats.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
  grads = jax.grad(lambda real: term.apply(params, state, {**feats, **real}, batch, context)[0])(
    real
  )
  return jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))


def _temperatures(state: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Quantiles over this batch of the temperatures that losses keep per sample, <side>/tau."""
  found = {}
  for path, table in jax.tree_util.tree_leaves_with_path(state):
    side, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2:]
    if name == "tau":
      ids = gcl.IDS[side]
      taus = tables.read({name: table}, batch[f"{ids}_id"])[name]
      for q in QUANTILES:
        found[f"temperature/{ids}/p{q}"] = jnp.quantile(taus, q / 100)
      for low, high in itertools.pairwise(EDGES):
        found[f"temperature/{ids}/{low:g}-{high:g}"] = ((low <= taus) & (taus < high)).mean()
  return found
