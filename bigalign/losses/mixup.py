"""Softmax losses on embeddings mixed along the sphere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

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
  """[]: cross-entropy of [B, E] against [B, E] in both directions, averaged.

  Row i of `a` has the target `first[i]` at row i of `c` and `second[i]` at row `partner[i]`, added
  where these are one; `partner` [B] int32 is a permutation. Masses need not add to 1, neither here
  nor in the other direction, whose targets are the transposed ones.
  """
  positive = engine.paired(a, c)  # [B]

  def tile(row, col, shared):
    z = engine.products(row["z"], col["z"])
    partners = row["partner"][:, None] == col["batch_index"][None, :]
    above = above_positives(z, row, col, shared["scale"])
    others = {k: jnp.where(partners, -jnp.inf, v) for k, v in above.items()}
    found = jnp.where(partners, z, 0)
    return {
      **others,
      "row_partner": found,
      "col_partner": found,
      "col_second": jnp.where(partners, row["second"][:, None], 0),
    }

  found = engine.reduce(
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
  alone = partner == jnp.arange(len(partner))

  def anchors(others, partner_cosine, second):
    """first * -log p of the first positive + second * -log p of the second, [B]."""
    ahead = scale * (positive - partner_cosine)
    own = jnp.where(alone, others, jnp.logaddexp(-ahead, others))
    partners = jnp.where(alone, others, ahead + jax.nn.softplus(others))
    return first * jax.nn.softplus(own) + second * jax.nn.softplus(partners)

  rows = anchors(found["i2t"], found["row_partner"], second)
  columns = anchors(found["t2i"], found["col_partner"], found["col_second"])
  return (rows.mean() + columns.mean()) / 2


def pair_mixed(
  zimg: jax.Array, ztxt: jax.Array, scale: jax.Array, share: jax.Array, *, engine: Engine
) -> jax.Array:
  """[]: the sum of both directions where pairs, mixed, take the place of the negatives (m²-mix)."""
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

  found = engine.reduce(
    tile,
    {"img": zimg, "txt": ztxt, "positive": positive},
    {"mixed": mixed},
    {"scale": scale},
    outputs={"img": "row_lse", "txt": "row_lse"},
  )
  return jax.nn.softplus(found["img"]).mean() + jax.nn.softplus(found["txt"]).mean()


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
  """CLIP + the weighted terms that `weights` names, and the value of each; options as of `m3mix`.

  shares: for each term, the share [] of the first in its mixtures. "v": images mixed with the image
    at the same place from the batch's end, against texts; "l": texts so mixed, against images;
    "vl": both; "m2": see `pair_mixed`.
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
    # Where both are mixed, both positives count in full.
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
  """CLIP and four geodesic mixtures: https://arxiv.org/abs/2203.03897.

  The shares of a mixture are drawn from Beta(alpha, alpha), one for each term and step. A term of
  weight 0 is not formed. In an odd batch the middle row is its own partner: it is mixed with
  itself, and all the mass of its target is its own.

  Args:
    w_v, w_l, w_vl, w_m: weights of mixed images, mixed texts, both mixed, and pairs mixed (m²).
    alpha, alpha_m: of the first three, and of m².
    tau2: temperature of m², the release's 0.07; None: that of the other terms.
    m2_average: m² as the average of its two directions, as the paper writes it; by default their
      sum, as in the release, whose weights these are.
    decay: mixtures count 1 / (epochs begun) as much.
    t_init: the logit scale. The authors fine-tune with a fixed temperature of 0.01.
    t_learned: whether the scale is learned; it then stays in [1, t_max].
  """
  for option, value in dict(alpha=alpha, alpha_m=alpha_m).items():
    if not value > 0:
      raise ValueError(f"config.loss.m3mix.{option}={value!r} of a Beta distribution: above 0")
  weights = {name: w for name, w in zip(TERMS, (w_v, w_l, w_vl, w_m)) if w}

  def draw(key):
    """The shares; in float32 even under x64, which would draw other numbers."""
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
  """CLIP and mixed pairs as negatives, `m3mix` without its other terms and with their options:
  https://arxiv.org/abs/2203.03897."""
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
