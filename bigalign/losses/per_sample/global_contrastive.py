"""What SogCLR, iSogCLR and FastCLIP share: global contrast by moving averages per sample.

An anchor i of one modality and its candidates k of the other have A_ik = S_ik - S_ii, for cosines
S. The anchor's g_i = mean over k != i of exp(A_ik / tau_i) enters a moving average each time its
sample is in a batch: u <- (1 - gamma) u + gamma g. The features get the gradient of
g_i / (u_i + eps), in which candidate k has the weight w_ik = exp(A_ik / tau_i) / (u_i + eps). All
of this is computed in logarithms: float32 cannot represent exp(1 / tau).

Images and texts are both anchors; their values are {"img": [B], "txt": [B]}.

With several texts per image, the set of an image's positive texts p is one anchor, whose row in the
tables is that of the image: captions may be drawn anew each time. Then g_i of an image is the mean
over p and over its candidates k of exp((S_ik - S_ip) / tau_i), and g_i of its texts the mean over p
and the other images k of exp((S_kp - S_ip) / tau_i). Candidates of an image are the positive texts
of other images and the hard negatives of all. Each image must have a positive text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.data.text.kinds import POSITIVE
from bigalign.losses.base import others
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.per_sample import tables
from bigalign.losses.texts import Texts, negatives, of_batch, row_lse

Anchors = dict[str, jax.Array]  # "img", "txt": [B]
# [B, D] and, as the texts of the model, [B, D] or [B M, D]: other embeddings of the pairs.
Reference = tuple[jax.Array, jax.Array] | None
IDS = {"img": "image", "txt": "text"}
FIXED = frozenset({"scale", "log_den", "reference"})  # row and column arrays without a gradient


def check_bounds(where: str, tau_init: float, tau_min: float, tau_max: float) -> None:
  """Raises ValueError for a first temperature of the samples that is not in its bounds."""
  if not tau_min <= tau_init <= tau_max:
    raise ValueError(
      f"{where}.tau_init={tau_init!r} must be between tau_min={tau_min!r} and tau_max={tau_max!r}"
    )


def check_texts(name: str, texts: str) -> None:
  """Raises ValueError for a wrong option `texts` of a loss."""
  checks.known(f"config.loss.{name}.texts", texts, ("one", "set"))


def needs(texts: str) -> frozenset[str]:
  """What a loss reads, with one text per image or several."""
  return frozenset({"ids", *(("texts",) if texts == "set" else ())})


def sizes_of(sizes: Mapping[str, Any], texts: str) -> Mapping[str, Any]:
  """The sizes of the tables: a set of texts has the row of its image."""
  return sizes if texts == "one" else {**sizes, "text": sizes["image"]}


def anchors(
  feats: Mapping[str, jax.Array], batch: Mapping[str, jax.Array], texts: str
) -> tuple[jax.Array | Texts, Mapping[str, jax.Array]]:
  """The text anchors, and the batch, whose "text_id" is then their row in the tables."""
  if texts == "one":
    return feats["ztxt"], batch
  several = of_batch(feats, batch)
  rows = {"text_id": batch["image_id"]} if "image_id" in batch else {}
  return several.z if several.per_image == 1 else several, {**batch, **rows}


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
  zimg: jax.Array,
  ztxt: jax.Array | Texts,
  tau: Anchors,
  reference: Reference = None,
  *,
  engine: Engine,
) -> tuple[Anchors, Anchors]:
  """log g and the largest exponent of each anchor, without a gradient.

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm, or several texts of each image.
    tau: temperatures of the anchors.
    reference: embeddings whose products are subtracted from the cosines, of `drrho`.
    engine: forms the logits.
  """
  zimg = jax.lax.stop_gradient(zimg)
  if isinstance(ztxt, Texts):
    ztxt = ztxt._replace(z=jax.lax.stop_gradient(ztxt.z))
  else:
    ztxt = jax.lax.stop_gradient(ztxt)
  count = ztxt.per_image if isinstance(ztxt, Texts) else 1

  def tile(row, col, shared):
    other_texts, other_images = _others(row, col, count)
    (img, txt), (scale_img, scale_txt) = _differences(row, col, engine), _scales(row, col)
    img = jnp.where(other_texts, scale_img * img, -jnp.inf)
    txt = jnp.where(other_images, scale_txt * txt, -jnp.inf)
    return {"img": img, "txt": txt, "img_top": img, "txt_top": txt}

  reduced = engine.reduce(
    tile,
    *_rows_and_columns(zimg, ztxt, tau, reference=reference, engine=engine),
    outputs=dict(img="row_lse", txt="col_lse", img_top="row_max", txt_top="col_max"),
  )
  log_others = math.log(others(len(zimg)))
  if not isinstance(ztxt, Texts):
    return {k: reduced[k] - log_others for k in IDS}, {k: reduced[f"{k}_top"] for k in IDS}
  positive = ztxt.positive
  txt = row_lse(ztxt.of_image(reduced["txt"]), positive) - log_others - jnp.log(positive.sum(1))
  top = jnp.where(positive, ztxt.of_image(reduced["txt_top"]), -jnp.inf).max(1)
  log_g = {"img": reduced["img"] - jnp.log(_candidates(ztxt)), "txt": txt}
  return log_g, {"img": reduced["img_top"], "txt": top}


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
  ztxt: jax.Array | Texts,
  tau: Anchors,
  log_den: Anchors,
  log_g: Anchors,
  reference: Reference = None,
  *,
  engine: Engine,
) -> Anchors:
  """[B] per anchor: sum over k of w_ik A_ik / (B - 1), with no gradient through w.

  Its mean is a surrogate whose gradient is that of tau_i g_i / exp(log_den_i).

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm, or several texts of each image.
    tau: temperatures of the anchors.
    log_den: log of the denominators u + eps.
    log_g: from `means`.
    reference: as of `means`.
    engine: forms the logits.
  """
  sums = engine.reduce(
    functools.partial(_pull, engine, ztxt.per_image if isinstance(ztxt, Texts) else 1),
    *_rows_and_columns(zimg, ztxt, tau, log_den, reference, engine=engine),
    outputs=dict(img="row_sum", txt="col_sum"),
    fixed=FIXED,
  )
  count = others(len(zimg))
  if not isinstance(ztxt, Texts):
    return each(lambda x, base: x / count + base, sums, _bases(tau, log_den, log_g))
  positive = ztxt.positive
  of_texts = jnp.where(positive, ztxt.of_image(sums["txt"]), 0).sum(1) / count
  dens = {**log_den, "txt": log_den["txt"] + jnp.log(positive.sum(1))}
  mean = mass(log_g, log_den)
  # Of an image, `_pull` has the softest minimum of its positives' cosines in place of their mean
  # by their weights: its gradient is the same, its value is not.
  own = jax.lax.stop_gradient(_own(zimg, ztxt, reference, engine))
  low = _softest(own, positive, tau["img"])
  above = own - low[:, None]  # small numbers, unlike the cosines
  share = jnp.where(positive, jnp.exp(-above / tau["img"][:, None]), 0)
  gap = (share * above).sum(1) / positive.sum(1)
  bases = {side: tau[side] * dens[side] * mean[side] for side in IDS}
  of_images = sums["img"] / _candidates(ztxt) - mean["img"] * gap
  return each(jnp.add, {"img": of_images, "txt": of_texts}, bases)


def weighted_both(
  zimg: jax.Array,
  ztxt: jax.Array | Texts,
  tau: Anchors,
  log_den: Anchors,
  log_g: Anchors,
  reference: Reference = None,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: `both(weighted(...))`, with one pass over the products less."""
  if isinstance(ztxt, Texts):
    return both(weighted(zimg, ztxt, tau, log_den, log_g, reference, engine=engine))
  b = len(zimg)
  sums = engine.total(
    functools.partial(_pull, engine, 1),
    *_rows_and_columns(zimg, ztxt, tau, log_den, reference, engine=engine),
    fixed=FIXED,
  )
  return sums / (b * (b - 1)) + both(_bases(tau, log_den, log_g))


def _bases(tau: Anchors, log_den: Anchors, log_g: Anchors) -> Anchors:
  """[B] per anchor: the part of `weighted` that `_pull` leaves out.

  The exponents of `_pull` are relative to log_den, so that an error of the weights is not
  multiplied by exponents of a hundred.
  """
  return each(lambda t, den, m: t * den * m, tau, log_den, mass(log_g, log_den))


def _others(row: Any, col: Any, count: int) -> tuple[jax.Array, jax.Array]:
  """[n, m] bool each: texts that are candidates of the images, and images of the texts."""
  if count == 1:
    other = ~pairwise.same(row, col)
    return other, other
  known = negatives(row, col, count)
  return known, known & (col["kind"] == POSITIVE)[None, :]


def _candidates(texts: Texts) -> jax.Array:
  """[B]: the number of each image's candidates."""
  return texts.present.sum() - texts.positive.sum(1)


def _softest(own: jax.Array, positive: jax.Array, tau: jax.Array) -> jax.Array:
  """[B]: -tau log of the mean over the positives of exp(-own / tau)."""
  lse = row_lse(-own / tau[:, None], positive)
  return -tau * (lse - jnp.log(positive.sum(1)))


def _pull(engine: Engine, count: int, row: Any, col: Any, shared: Any) -> dict[str, jax.Array]:
  other_texts, other_images = _others(row, col, count)

  def pulled(a: jax.Array, scale: jax.Array, log_den: jax.Array, other: jax.Array) -> jax.Array:
    exponent = scale * a - log_den
    # As SogCLR was released, rows with one id have the u of the last one, so that weights of the
    # others can be large.
    w = jnp.where(other, jnp.exp(jnp.minimum(exponent, _largest(exponent.dtype))), 0)
    return jax.lax.stop_gradient(w / scale) * exponent

  (img, txt), (scale_img, scale_txt) = _differences(row, col, engine), _scales(row, col)
  return {
    "img": pulled(img, scale_img, row["log_den"][:, None], other_texts),
    "txt": pulled(txt, scale_txt, col["log_den"][None, :], other_images),
  }


def _largest(dtype: Any) -> float:
  """An exponent whose exponential can still be multiplied."""
  return math.log(jnp.finfo(dtype).max) - 8


def _differences(row: Any, col: Any, engine: Engine) -> tuple[jax.Array, jax.Array]:
  """A [n, m] of a tile's images and of its texts."""
  z = engine.products(row["z"], col["z"])
  if "reference" in row:
    z -= jax.lax.stop_gradient(engine.products(row["reference"], col["reference"]))
  return z - row["positive"][:, None], z - col["positive"][None, :]


def _scales(row: Any, col: Any) -> tuple[jax.Array, jax.Array]:
  return row["scale"][:, None], col["scale"][None, :]


def _rows_and_columns(
  zimg: jax.Array,
  ztxt: jax.Array | Texts,
  tau: Anchors,
  log_den: Anchors | None = None,
  reference: Reference = None,
  *,
  engine: Engine,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  if isinstance(ztxt, Texts):
    return _sets(zimg, ztxt, tau, log_den, reference, engine)
  positive = engine.paired(zimg, ztxt)
  if reference is not None:
    positive -= jax.lax.stop_gradient(engine.paired(*reference))

  def side(z: jax.Array, name: str) -> dict[str, jax.Array]:
    more = {} if log_den is None else {"log_den": log_den[name]}
    more |= {} if reference is None else {"reference": reference[[*IDS].index(name)]}
    known = jax.lax.stop_gradient({"scale": 1 / tau[name], **more})
    return {"z": z, "positive": positive, **known}

  return side(zimg, "img"), side(ztxt, "txt")


def _own(zimg: jax.Array, texts: Texts, reference: Reference, engine: Engine) -> jax.Array:
  """[B, M]: the cosines of each image and its own texts, minus those of the reference."""
  own = texts.cosines(zimg, engine)
  if reference is not None:
    img, txt = reference
    own -= jax.lax.stop_gradient(texts._replace(z=txt).cosines(img, engine))
  return own


def _sets(
  zimg: jax.Array,
  texts: Texts,
  tau: Anchors,
  log_den: Anchors | None,
  reference: Reference,
  engine: Engine,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """The rows and columns of images and sets of texts."""
  positive, own = texts.positive, _own(zimg, texts, reference, engine)
  tau = jax.lax.stop_gradient(tau)

  def spread(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jax.lax.stop_gradient(x)[:, None], own.shape)

  rows = {"z": zimg, "positive": _softest(own, positive, tau["img"]), "scale": 1 / tau["img"]}
  columns = texts.columns(positive=own, scale=spread(1 / tau["txt"]))
  if log_den is not None:
    rows["log_den"] = jax.lax.stop_gradient(log_den["img"])
    number = jnp.log(positive.sum(1))  # a text's part of the mean over its set
    columns |= {"log_den": spread(log_den["txt"] + number).reshape(-1)}
  if reference is not None:
    rows["reference"], columns["reference"] = jax.lax.stop_gradient(reference)
  return rows, columns
