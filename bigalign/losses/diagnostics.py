"""Diagnostics of a loss on one batch; too expensive for every step."""

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
from bigalign.losses.per_sample import global_contrastive, tables

QUANTILES = (5, 50, 95)
EDGES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, math.inf)  # bins of the temperatures


def diagnose(
  loss: Loss,
  params: Any,
  state: Any,
  feats: Mapping[str, jax.Array],
  batch: Mapping[str, jax.Array],
  context: Context,
) -> dict[str, jax.Array]:
  """Diagnostics of a weighted sum of losses on one batch; arguments as of Loss.apply.

  Returns:
    "hardest_negative/image", "/text": the largest cosine of an image (a text) with another pair's
      text (image), averaged over the batch; "rank_1/image", "/text": share of images (texts) whose
      own text (image) has a larger cosine.
    "saturation/image", "/text": share of images (texts) whose softmax, at the logit scale, gives
      their own text (image) more than 0.99, so that their gradient is small; only for a loss with a
      logit scale.
    "gradient_share/<term>": for several terms, the norm of a term's weighted gradient with respect
      to the features, divided by the sum of these norms.
    "temperature/image/p5", "/p50", "/p95", "temperature/text/…": quantiles over the batch of
      per-sample temperatures. "temperature/image/0.01-0.02", …: their histogram, the share of the
      batch in each bin.
  """
  metrics = {**_negatives(loss, params, feats, context.engine), **_temperatures(state, batch)}
  if len(loss.terms) > 1:
    norms = {
      name: weight
      * _gradient_norm(term, params.get(name, {}), state.get(name, {}), feats, batch, context)
      for name, (weight, term) in loss.terms.items()
    }
    total = sum(norms.values())
    metrics |= {f"gradient_share/{name}": x / total for name, x in norms.items()}
  return metrics


def _negatives(
  loss: Loss, params: Any, feats: Mapping[str, jax.Array], engine: Engine
) -> dict[str, jax.Array]:
  zimg, ztxt = (jax.lax.stop_gradient(feats[k]) for k in ("zimg", "ztxt"))
  scales = [jnp.exp(params[name]["t"]) for name in loss.terms if "t" in params.get(name, {})]
  positive = engine.paired(zimg, ztxt)

  def tile(row: Any, col: Any, shared: Any) -> dict[str, jax.Array]:
    s = jnp.where(pairwise.same(row, col), -jnp.inf, engine.products(row["z"], col["z"]))
    scale = shared["scale"]
    return {
      "image": s,
      "text": s,
      "image_lse": scale * (s - row["positive"][:, None]),
      "text_lse": scale * (s - col["positive"][None, :]),
    }

  largest = engine.reduce(
    tile,
    {"z": zimg, "positive": positive},
    {"z": ztxt, "positive": positive},
    {"scale": scales[0] if scales else jnp.ones(())},
    outputs={"image": "row_max", "text": "col_max", "image_lse": "row_lse", "text_lse": "col_lse"},
  )
  metrics = {}
  for side in ("image", "text"):
    metrics[f"hardest_negative/{side}"] = largest[side].mean()
    metrics[f"rank_1/{side}"] = (positive > largest[side]).mean()
    if scales:
      metrics[f"saturation/{side}"] = (jax.nn.sigmoid(-largest[f"{side}_lse"]) > 0.99).mean()
  return metrics


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
  metrics = {}
  for path, table in jax.tree_util.tree_leaves_with_path(state):
    side, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2:]
    if name == "tau":
      ids = global_contrastive.IDS[side]
      taus = tables.read({name: table}, batch[f"{ids}_id"])[name]
      for q in QUANTILES:
        metrics[f"temperature/{ids}/p{q}"] = jnp.quantile(taus, q / 100)
      for low, high in itertools.pairwise(EDGES):
        metrics[f"temperature/{ids}/{low:g}-{high:g}"] = ((low <= taus) & (taus < high)).mean()
  return metrics
