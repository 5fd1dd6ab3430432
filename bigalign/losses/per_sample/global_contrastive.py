"""What SogCLR, iSogCLR and FastCLIP share: global contrast by moving averages per sample.

An anchor i of one modality and its candidates k of the other have A_ik = S_ik - S_ii, for cosines
S. The anchor's g_i = mean over k != i of exp(A_ik / tau_i) enters a moving average each time its
sample is in a batch: u <- (1 - gamma) u + gamma g. The features get the gradient of
g_i / (u_i + eps), in which candidate k has the weight w_ik = exp(A_ik / tau_i) / (u_i + eps). All
of this is computed in logarithms: float32 cannot represent exp(1 / tau).

Images and texts are both anchors; their values are {"img": [B], "txt": [B]}.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign.losses.base import others
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.per_sample import tables

Anchors = dict[str, jax.Array]  # "img", "txt": [B]
IDS = {"img": "image", "txt": "text"}
FIXED = frozenset({"scale", "log_den"})  # row and column arrays without a gradient


def check_bounds(where: str, tau_init: float, tau_min: float, tau_max: float) -> None:
  """Raises ValueError for a first temperature of the samples that is not in its bounds."""
  if not tau_min <= tau_init <= tau_max:
    raise ValueError(
      f"{where}.tau_init={tau_init!r} must be between tau_min={tau_min!r} and tau_max={tau_max!r}"
    )


def each(function: Callable[..., Any], *anchors: Mapping[str, Any]) -> dict[str, Any]:
  """Applies `function` to the image anchors and to the text anchors."""
  return {side: function(*(x[side] for x in anchors)) for side in IDS}


def both(anchors: Anchors) -> jax.Array:
  """[]: the mean over images plus the mean over texts."""
  return anchors["img"].mean() + anchors["txt"].mean()


def make_tables(sizes: Mapping[str, int], **fills: float) -> dict[str, Any]:
  """{side: {name: table}}: a table filled with each number, for images and for texts."""
  return {
    side: {name: tables.make(sizes[ids], fill) for name, fill in fills.items()}
    for side, ids in IDS.items()
  }


def read_tables(state: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, Any]:
  """{side: {name: [B]}}: the rows of the batch."""
  return {side: tables.read(state[side], batch[f"{ids}_id"]) for side, ids in IDS.items()}


def write_tables(
  state: Mapping[str, Any], batch: Mapping[str, jax.Array], values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Writes {side: {name: [B]}}; returns the state and the values that each id now has."""
  written = {
    side: tables.write(state[side], batch[f"{ids}_id"], values[side]) for side, ids in IDS.items()
  }
  return each(lambda x: x[0], written), each(lambda x: x[1], written)


def is_finite(*values: Mapping[str, Any]) -> jax.Array:
  """[] bool: no value of {side: {name: [B]}} is NaN or +inf; log u may be -inf."""
  return jnp.stack([jnp.all(x < jnp.inf) for x in jax.tree.leaves(values)]).all()


def means(
  zimg: jax.Array, ztxt: jax.Array, tau: Anchors, *, engine: Engine
) -> tuple[Anchors, Anchors]:
  """log g and the largest exponent of each anchor, without a gradient.

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm.
    tau: temperatures of the anchors.
    engine: forms the logits.
  """
  zimg, ztxt = jax.lax.stop_gradient((zimg, ztxt))

  def tile(row, col, shared):
    other = ~pairwise.same(row, col)
    (img, txt), (scale_img, scale_txt) = _differences(row, col, engine), _scales(row, col)
    img, txt = (jnp.where(other, x, -jnp.inf) for x in (scale_img * img, scale_txt * txt))
    return {"img": img, "txt": txt, "img_top": img, "txt_top": txt}

  reduced = engine.reduce(
    tile,
    *_rows_and_columns(zimg, ztxt, tau, engine=engine),
    outputs=dict(img="row_lse", txt="col_lse", img_top="row_max", txt_top="col_max"),
  )
  log_others = math.log(others(len(zimg)))
  return {k: reduced[k] - log_others for k in IDS}, {k: reduced[f"{k}_top"] for k in IDS}


def average(log_u: jax.Array, log_g: jax.Array, gamma: Any, fresh: jax.Array | None) -> jax.Array:
  """[B]: log((1 - gamma) u + gamma g), and log g where `fresh` [B] bool."""
  new = jnp.logaddexp(jnp.log1p(-gamma) + log_u, jnp.log(gamma) + log_g)
  return new if fresh is None else jnp.where(fresh, log_g, new)


def with_eps(log_u: jax.Array, eps: float, b: jax.Array | float = 0.0) -> jax.Array:
  """log(u + eps exp(b))."""
  return jnp.logaddexp(log_u, math.log(eps) + b) if eps else log_u


def with_slope(value: jax.Array, surrogate: jax.Array) -> jax.Array:
  """[]: the value of `value`, with the gradient of `surrogate`."""
  return jax.lax.stop_gradient(value) + (surrogate - jax.lax.stop_gradient(surrogate))


def mass(log_g: Anchors, log_den: Anchors) -> Anchors:
  """[B] per anchor: g / exp(log_den), the mean of its weights."""
  return each(lambda g, den: jnp.exp(g - den), log_g, log_den)


def weighted(
  zimg: jax.Array,
  ztxt: jax.Array,
  tau: Anchors,
  log_den: Anchors,
  log_g: Anchors,
  *,
  engine: Engine,
) -> Anchors:
  """[B] per anchor: sum over k of w_ik A_ik / (B - 1), with no gradient through w.

  Its mean is a surrogate whose gradient is that of tau_i g_i / exp(log_den_i).

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm.
    tau: temperatures of the anchors.
    log_den: log of the denominators u + eps.
    log_g: from `means`.
    engine: forms the logits.
  """
  sums = engine.reduce(
    functools.partial(_pull, engine),
    *_rows_and_columns(zimg, ztxt, tau, log_den, engine=engine),
    outputs=dict(img="row_sum", txt="col_sum"),
    fixed=FIXED,
  )
  count = others(len(zimg))
  return each(lambda x, base: x / count + base, sums, _bases(tau, log_den, log_g))


def weighted_both(
  zimg: jax.Array,
  ztxt: jax.Array,
  tau: Anchors,
  log_den: Anchors,
  log_g: Anchors,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: `both(weighted(...))`, with one pass over the products less."""
  b = len(zimg)
  sums = engine.total(
    functools.partial(_pull, engine),
    *_rows_and_columns(zimg, ztxt, tau, log_den, engine=engine),
    fixed=FIXED,
  )
  return sums / (b * (b - 1)) + both(_bases(tau, log_den, log_g))


def _bases(tau: Anchors, log_den: Anchors, log_g: Anchors) -> Anchors:
  """[B] per anchor: the part of `weighted` that `_pull` leaves out.

  The exponents of `_pull` are relative to log_den, so that an error of the weights is not
  multiplied by exponents of a hundred.
  """
  return each(lambda t, den, m: t * den * m, tau, log_den, mass(log_g, log_den))


def _pull(engine: Engine, row: Any, col: Any, shared: Any) -> dict[str, jax.Array]:
  other = ~pairwise.same(row, col)

  def pulled(a: jax.Array, scale: jax.Array, log_den: jax.Array) -> jax.Array:
    exponent = scale * a - log_den
    # As SogCLR was released, rows with one id have the u of the last one, so that weights of the
    # others can be large.
    w = jnp.where(other, jnp.exp(jnp.minimum(exponent, _largest(exponent.dtype))), 0)
    return jax.lax.stop_gradient(w / scale) * exponent

  (img, txt), (scale_img, scale_txt) = _differences(row, col, engine), _scales(row, col)
  return {
    "img": pulled(img, scale_img, row["log_den"][:, None]),
    "txt": pulled(txt, scale_txt, col["log_den"][None, :]),
  }


def _largest(dtype: Any) -> float:
  """An exponent whose exponential can still be multiplied."""
  return math.log(jnp.finfo(dtype).max) - 8


def _differences(row: Any, col: Any, engine: Engine) -> tuple[jax.Array, jax.Array]:
  """A [n, m] of a tile's images and of its texts."""
  z = engine.products(row["z"], col["z"])
  return z - row["positive"][:, None], z - col["positive"][None, :]


def _scales(row: Any, col: Any) -> tuple[jax.Array, jax.Array]:
  return row["scale"][:, None], col["scale"][None, :]


def _rows_and_columns(
  zimg: jax.Array,
  ztxt: jax.Array,
  tau: Anchors,
  log_den: Anchors | None = None,
  *,
  engine: Engine,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  positive = engine.paired(zimg, ztxt)

  def side(z: jax.Array, name: str) -> dict[str, jax.Array]:
    more = {} if log_den is None else {"log_den": log_den[name]}
    known = jax.lax.stop_gradient({"scale": 1 / tau[name], **more})
    return {"z": z, "positive": positive, **known}

  return side(zimg, "img"), side(ztxt, "txt")
