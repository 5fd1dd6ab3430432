"""Softmax losses on embeddings that are mixed along the sphere (geodesic mixup)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives, contrast
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.sphere import geodesic

TERMS = ("v", "l", "vl", "m2")


def two_positives(
  a: jax.Array,
  c: jax.Array,
  scale: jax.Array,
  first: jax.Array,
  second: jax.Array,
  partner: jax.Array,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: a cross-entropy with two positives, averaged over both directions.

  Row i of `a` has the target first[i] at row i of `c` and second[i] at row partner[i], added if
  these are the same row. The targets of the other direction are the transposed ones. The targets of
  a row need not sum to 1.

  Args:
    a: [B, E], unit norm.
    c: [B, E], unit norm.
    scale: [], of the logits.
    first: [B], targets.
    second: [B], targets.
    partner: [B] int32, a permutation.
    engine: forms the logits.
  """
  positive = engine.paired(a, c)  # [B]

  def tile(row, col, shared):
    z = engine.products(row["z"], col["z"])
    partners = row["partner"][:, None] == col["batch_index"][None, :]
    above = above_positives(z, row, col, shared["scale"])
    others = {k: jnp.where(partners, -jnp.inf, v) for k, v in above.items()}
    partner_cosine = jnp.where(partners, z, 0)
    return {
      **others,
      "row_partner": partner_cosine,
      "col_partner": partner_cosine,
      "col_second": jnp.where(partners, row["second"][:, None], 0),
    }

  reduced = engine.reduce(
    tile,
    {"z": a, "positive": positive, "second": second, "partner": partner},
    {"z": c, "positive": positive},
    {"scale": scale},
    outputs={
      "i2t": "row_lse",
      "t2i": "col_lse",
      "row_partner": "row_sum",
      "col_partner": "col_sum",
      "col_second": "col_sum",
    },
  )
  self_paired = partner == jnp.arange(len(partner))

  def anchors(others, partner_cosine, second):
    """[B]: first * -log p of the first positive + second * -log p of the second."""
    margin = scale * (positive - partner_cosine)
    own = jnp.where(self_paired, others, jnp.logaddexp(-margin, others))
    partners = jnp.where(self_paired, others, margin + jax.nn.softplus(others))
    return first * jax.nn.softplus(own) + second * jax.nn.softplus(partners)

  rows = anchors(reduced["i2t"], reduced["row_partner"], second)
  columns = anchors(reduced["t2i"], reduced["col_partner"], reduced["col_second"])
  loss: jax.Array = (rows.mean() + columns.mean()) / 2
  return loss


def pair_mixed(
  zimg: jax.Array, ztxt: jax.Array, scale: jax.Array, share: jax.Array, *, engine: Engine
) -> jax.Array:
  """[]: the softmax loss with mixed pairs as negatives (m²-mix), summed over both directions.

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm.
    scale: [], of the logits.
    share: [], share of the image in the mixture of a pair.
    engine: forms the logits.
  """
  mixed = geodesic(zimg, ztxt, share)
  positive = engine.paired(zimg, ztxt)

  def tile(row, col, shared):
    return {
      k: jnp.where(
        pairwise.same(row, col),
        -jnp.inf,
        shared["scale"] * (engine.products(row[k], col["mixed"]) - row["positive"][:, None]),
      )
      for k in ("img", "txt")
    }

  lse = engine.reduce(
    tile,
    {"img": zimg, "txt": ztxt, "positive": positive},
    {"mixed": mixed},
    {"scale": scale},
    outputs={"img": "row_lse", "txt": "row_lse"},
  )
  return jax.nn.softplus(lse["img"]).mean() + jax.nn.softplus(lse["txt"]).mean()


def mixture(
  zimg: jax.Array,
  ztxt: jax.Array,
  scale: jax.Array,
  shares: Mapping[str, jax.Array],
  weights: Mapping[str, Any],
  *,
  tau2: float | None,
  m2_average: bool,
  engine: Engine,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """CLIP's loss plus weighted mixture terms.

  The terms: "v", images against texts, where an image is mixed with the image at the same position
  from the end of the batch; "l", texts mixed in this way, against images; "vl", both mixed; "m2",
  see `pair_mixed`.

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm.
    scale: [], of the logits.
    shares: {term: []}, the share of the first sample in a mixture.
    weights: {term: weight}.
    tau2: as in `m3mix`.
    m2_average: as in `m3mix`.
    engine: forms the logits.

  Returns:
    The sum, and the value of each term, with "clip".
  """
  partner = jnp.arange(len(zimg) - 1, -1, -1, dtype=jnp.int32)
  every = jnp.ones(len(zimg), zimg.dtype)
  terms = {"clip": contrast(zimg, ztxt, scale, engine=engine)}
  for name in weights:
    share = jnp.asarray(shares[name], zimg.dtype)
    if name == "m2":
      m2_scale = scale if tau2 is None else jnp.asarray(1 / tau2, zimg.dtype)
      both = pair_mixed(zimg, ztxt, m2_scale, share, engine=engine)
      terms[name] = both * (0.5 if m2_average else 1)
      continue
    a = geodesic(zimg, zimg[::-1], share) if "v" in name else zimg
    c = geodesic(ztxt, ztxt[::-1], share) if "l" in name else ztxt
    # If both are mixed, both positives have the target 1.
    first, second = (every, every) if name == "vl" else (share * every, (1 - share) * every)
    terms[name] = two_positives(a, c, scale, first, second, partner, engine=engine)
  return terms["clip"] + sum(w * terms[name] for name, w in weights.items()), terms


def m3mix(
  *,
  w_v: float = 0.05,
  w_l: float = 0.05,
  w_vl: float = 0.1,
  w_m: float = 0.01,
  alpha: float = 0.5,
  alpha_m: float = 0.2,
  tau2: float | None = 0.07,
  m2_average: bool = False,
  decay: bool = False,
  t_init: float = 100.0,
  t_learned: bool = False,
  t_max: float | None = 100.0,
) -> Loss:
  """CLIP and four geodesic mixtures: m³-mix, https://arxiv.org/abs/2203.03897.

  The share of a mixture is drawn from Beta(alpha, alpha), once for each term and step. A term with
  weight 0 is not computed. In an odd batch the middle sample is mixed with itself.

  Args:
    w_v: weight of mixed images against texts.
    w_l: weight of mixed texts against images.
    w_vl: weight of mixed images against mixed texts.
    w_m: weight of mixed pairs as negatives (m²).
    alpha: of the Beta distribution of the first three.
    alpha_m: of that of m².
    tau2: temperature of m²; 0.07 in the release; None: that of the other terms.
    m2_average: whether m² is the average of its two directions, as in the paper; by default it is
      their sum, as in the release, for which the default weights are.
    decay: whether the weights of the mixtures are divided by the number of epochs begun.
    t_init: the logit scale. The authors fine-tune with a fixed temperature of 0.01.
    t_learned: whether the scale is learned; it then stays in [1, t_max].
    t_max: upper bound of a learned scale, with the lower bound 1; None: no bounds.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> metrics = apply_once(m3mix(t_init=1.0), {"zimg": z, "ztxt": z})
    >>> sorted(metrics)
    ['contrastive_loss', 'l', 'logit_scale', 'loss', 'm2', 'v', 'vl']
  """
  _check("m3mix", tau2, t_init, t_max, t_learned, alpha=alpha, alpha_m=alpha_m)
  weights = {name: w for name, w in zip(TERMS, (w_v, w_l, w_vl, w_m)) if w}

  def draw(key):
    """The shares, drawn in float32 even under x64, which would draw different numbers."""
    keys = dict(zip(TERMS, jax.random.split(key, len(TERMS))))
    alphas = {name: alpha_m if name == "m2" else alpha for name in weights}
    return {k: jax.random.beta(keys[k], a, a, (), jnp.float32) for k, a in alphas.items()}

  def init(sizes):
    return temperature.init(t_init, learned=t_learned), {}

  def apply(params, state, feats, batch, context):
    zimg, ztxt = feats["zimg"], feats["ztxt"]
    scale = temperature.scale(params, t_init, zimg)
    now = 1 / (1 + jnp.floor(context.epochs)) if decay else 1.0
    loss, terms = mixture(
      zimg,
      ztxt,
      scale,
      draw(context.key),
      {name: now * w for name, w in weights.items()},
      tau2=tau2,
      m2_average=m2_average,
      engine=context.engine,
    )
    logs = {"contrastive_loss": terms.pop("clip"), **terms, "logit_scale": scale}
    return loss, (state, {"loss": loss, **logs})

  return Loss(frozenset(), init, apply, temperature.clamped(t_max))


def m2mix(
  *,
  w_m: float = 0.01,
  alpha_m: float = 0.5,
  tau2: float | None = 0.07,
  m2_average: bool = False,
  decay: bool = False,
  t_init: float = 100.0,
  t_learned: bool = False,
  t_max: float | None = 100.0,
) -> Loss:
  """CLIP and mixed pairs as negatives: m²-mix, https://arxiv.org/abs/2203.03897.

  It is `m3mix` without its other terms.

  Args:
    w_m: weight of the mixed pairs.
    alpha_m: of the Beta distribution of the mixtures' share.
    tau2: as in `m3mix`.
    m2_average: as in `m3mix`.
    decay: as in `m3mix`.
    t_init: as in `m3mix`.
    t_learned: as in `m3mix`.
    t_max: as in `m3mix`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> metrics = apply_once(m2mix(t_init=1.0), {"zimg": z, "ztxt": z})
    >>> round(float(metrics["contrastive_loss"]), 3)
    0.744
  """
  _check("m2mix", tau2, t_init, t_max, t_learned, alpha_m=alpha_m)
  return m3mix(
    w_v=0.0,
    w_l=0.0,
    w_vl=0.0,
    w_m=w_m,
    alpha_m=alpha_m,
    tau2=tau2,
    m2_average=m2_average,
    decay=decay,
    t_init=t_init,
    t_learned=t_learned,
    t_max=t_max,
  )


def _check(
  name: str,
  tau2: float | None,
  t_init: float,
  t_max: float | None,
  t_learned: bool,
  **alphas: float,
) -> None:
  """Raises ValueError for an option of `m3mix` or `m2mix` that is out of its bounds."""
  for option, value in alphas.items():
    if not value > 0:
      raise ValueError(
        f"config.loss.{name}.{option}={value!r} is a parameter of a Beta distribution; it must be"
        " above 0"
      )
  temperature.check(name, t_init, t_max, learned=t_learned)
  if tau2 is not None:
    checks.above_zero(f"config.loss.{name}", tau2=tau2)
