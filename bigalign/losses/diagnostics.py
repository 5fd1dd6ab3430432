"""Diagnostics of a loss on one batch; too expensive for every step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign.losses.base import Context, Loss
from bigalign.losses.engine import pairwise, tiles
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.per_sample import global_contrastive, tables
from bigalign.sphere import unit

QUANTILES = (5, 50, 95)
FREQUENCY = "caption_frequency"  # a column of the batch that the temperatures are compared with
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
      logit scale. With the scales of several terms: "saturation/<term>/image".
    "gradient_share/<term>": for several terms without layers of their own, the norm of a term's
      weighted gradient, divided by the sum of these norms. The gradient is that with respect to the
      embeddings before normalisation, scaled to norm 1, so that their lengths do not matter and the
      radial part of a gradient, which normalisation removes, does not count; and to tokens, for a
      term that reads them.
    "temperature/image/p5", "/p50", "/p95", "temperature/text/…": quantiles over the batch of
      per-sample temperatures. "temperature/image/0.01-0.02", …: their histogram, the share of the
      batch in each bin. If several terms, or widths of one, have such temperatures:
      "temperature/<term>/image/p5".
    "temperature/image/caption_frequency_slope", "…_pearson_r", "temperature/text/…": if the batch
      has the column `caption_frequency` [B], such as `bigalign balance` writes, the line through
      the same temperatures over log10 of that column, of the samples where it is above 0. iSogCLR
      (https://arxiv.org/abs/2305.11965) finds larger temperatures for frequent captions.
  """
  metrics = _temperatures(state, batch)
  if "zimg" in feats:  # not of texts alone
    metrics = {**_negatives(loss, params, feats, context.engine), **metrics}
  terms = {name: x for name, x in loss.terms.items() if x[1].head is None}
  if len(terms) > 1:
    norms = {
      name: abs(weight)
      * _gradient_norm(term, params.get(name, {}), state.get(name, {}), feats, batch, context)
      for name, (weight, term) in terms.items()
    }
    total = jnp.maximum(sum(norms.values()), jnp.finfo(jnp.float32).tiny)
    metrics |= {f"gradient_share/{name}": x / total for name, x in norms.items()}
  return metrics


def _negatives(
  loss: Loss, params: Any, feats: Mapping[str, jax.Array], engine: Engine
) -> dict[str, jax.Array]:
  zimg, ztxt = (jax.lax.stop_gradient(feats[k]) for k in ("zimg", "ztxt"))
  scales = {name: jnp.exp(params[name]["t"]) for name in loss.terms if "t" in params.get(name, {})}
  positive = engine.paired(zimg, ztxt)

  def tile(row: Any, col: Any, shared: Any) -> dict[str, jax.Array]:
    s = jnp.where(pairwise.same(row, col), -jnp.inf, engine.products(row["z"], col["z"]))
    above = {"image": s - row["positive"][:, None], "text": s - col["positive"][None, :]}
    lse = {
      f"{side}_lse/{name}": scale * x for side, x in above.items() for name, scale in shared.items()
    }
    return {"image": s, "text": s, **lse}

  largest = engine.reduce(
    tile,
    {"z": zimg, "positive": positive},
    {"z": ztxt, "positive": positive},
    scales,
    outputs={
      "image": "row_max",
      "text": "col_max",
      **{f"image_lse/{name}": "row_lse" for name in scales},
      **{f"text_lse/{name}": "col_lse" for name in scales},
    },
  )
  metrics = {}
  for side in ("image", "text"):
    metrics[f"hardest_negative/{side}"] = largest[side].mean()
    metrics[f"rank_1/{side}"] = (positive > largest[side]).mean()
    for name in scales:
      share = (jax.nn.sigmoid(-largest[f"{side}_lse/{name}"]) > 0.99).mean()
      metrics[f"saturation/{side}" if len(scales) == 1 else f"saturation/{name}/{side}"] = share
  return metrics


def _gradient_norm(
  term: Loss,
  params: Any,
  state: Any,
  feats: Mapping[str, jax.Array],
  batch: Mapping[str, jax.Array],
  context: Context,
) -> jax.Array:
  """[]: see "gradient_share" of `diagnose`; without the weight."""
  feats, batch = tiles.widened(feats), tiles.widened(batch)
  embedded = ("zimg", "zimgs", "ztxt", "ztxts", "ztxt_second", "zquery", "zdocument")
  names = (*embedded, "tokens_img", "tokens_txt")
  lengths = {
    f"raw_{side}": jnp.linalg.norm(feats[f"raw_{side}"], axis=-1, keepdims=True)
    for side in ("img", "txt")
    if f"raw_{side}" in feats
  }

  def value(learned: dict[str, jax.Array]) -> jax.Array:
    units = {name: unit(x) for name, x in learned.items() if name.startswith("z")}
    raw = {name: length * learned[f"z{name[4:]}"] for name, length in lengths.items()}
    return term.apply(params, state, {**feats, **learned, **units, **raw}, batch, context)[0]

  grads = jax.grad(value)({name: feats[name] for name in names if name in feats})
  return jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))


def has_temperatures(loss: Loss, sizes: Mapping[str, Any]) -> bool:
  """Whether a loss keeps a temperature of each sample; sizes: as of Loss.init."""
  return bool(_temperature_tables(jax.eval_shape(lambda: loss.init(sizes))[1]))


def _temperature_tables(state: Any) -> dict[tuple[str, str], Any]:
  """{(term, or term and width; side): table} of the temperatures of samples."""
  found = {}
  for path, table in jax.tree_util.tree_leaves_with_path(state):
    *owners, side, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if name == "tau":
      found["/".join(owners), side] = table
  return found


def _temperatures(state: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Quantiles over this batch of the temperatures that losses keep per sample."""
  found = _temperature_tables(state)
  several = len({owner for owner, _ in found}) > 1
  metrics = {}
  for (owner, side), table in found.items():
    ids = global_contrastive.IDS[side]
    prefix = f"temperature/{owner}/{ids}" if several else f"temperature/{ids}"
    taus = tables.read({"tau": table}, batch[f"{ids}_id"])["tau"]
    for q in QUANTILES:
      metrics[f"{prefix}/p{q}"] = jnp.quantile(taus, q / 100)
    for low, high in itertools.pairwise(EDGES):
      metrics[f"{prefix}/{low:g}-{high:g}"] = ((low <= taus) & (taus < high)).mean()
    if FREQUENCY in batch:
      fitted = _line(taus, batch[FREQUENCY])
      metrics |= {f"{prefix}/{FREQUENCY}_{name}": x for name, x in fitted.items()}
  return metrics


def _line(taus: jax.Array, frequency: jax.Array) -> dict[str, jax.Array]:
  """Slope and Pearson's r of temperatures [B] over log10 of frequencies [B].

  Frequencies that are 0 or NaN do not count. Both are 0 if all temperatures, or all frequencies,
  are equal.
  """
  used = frequency > 0
  n = jnp.maximum(used.sum(), 1)
  x, y = (
    jnp.where(used, z - jnp.where(used, z, 0).sum() / n, 0)
    for z in (jnp.log10(jnp.where(used, frequency, 1)), taus)
  )
  xx, yy, xy = (jnp.vdot(a, b) for a, b in ((x, x), (y, y), (x, y)))
  # Equal numbers differ from their mean by rounding errors, whose correlation means nothing.
  differ = (jnp.abs(x).max() > 1e-6) & (jnp.abs(y).max() > 1e-6 * jnp.abs(taus).max())
  slope, r = xy / jnp.maximum(xx, 1e-30), xy / jnp.maximum(jnp.sqrt(xx) * jnp.sqrt(yy), 1e-30)
  return {"slope": jnp.where(differ, slope, 0), "pearson_r": jnp.where(differ, r, 0)}
