"""Geometry of the embeddings: the gap of the modalities, uniformity, effective rank, hubness."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import sharding
from bigalign.evals.embed import Context, Embedded, embedder, open_data, prefix
from bigalign.losses.engine import pairwise

RECALL_AT = (1, 5, 10)
NEAREST = 10  # of each query, for hubness
CHUNK = 2**24  # similarities at a time, for hubness: 64 MB
HIGHEST = jax.lax.Precision.HIGHEST


def measure(
  zimg: jax.Array,
  ztxt: jax.Array,
  *,
  train: jax.Array,
  valid: jax.Array | None = None,
  uniformity_t: float = 2.0,
  logreg_c: float = 1.0,
) -> dict[str, jax.Array]:
  """Returns all metrics of N pairs; memory is O(N E) and a tile, over the current mesh.

  >>> z = jnp.eye(8)
  >>> figures = measure(z, z, train=jnp.arange(8) < 6)
  >>> float(figures["mean_pair_cosine"]), float(figures["centroid_distance"])
  (1.0, 0.0)

  Args:
    zimg: [N, E], unit norm.
    ztxt: [N, E], unit norm; row i belongs to row i of zimg.
    train: [N] bool, pairs to fit the classifier of images and texts; the others test it.
    valid: [N] bool, the pairs that count; None: all.
    uniformity_t: t of `pairs`.
    logreg_c: c of `separability`.

  Returns:
    {name: scalar}; see `moments`, `pairs`, `hubness` and `separability`.
  """
  valid = jnp.ones(len(zimg), bool) if valid is None else valid
  zimg, ztxt = (jnp.where(valid[:, None], z, 0) for z in (zimg, ztxt))  # invalid rows may be NaN
  return {
    **moments(zimg, ztxt, valid),
    **pairs(zimg, ztxt, valid, t=uniformity_t),
    "hubness_i2t": hubness(zimg, ztxt, valid),
    "hubness_t2i": hubness(ztxt, zimg, valid),
    **separability(zimg, ztxt, valid, train, c=logreg_c),
  }


def moments(zimg: jax.Array, ztxt: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
  """Returns the metrics that follow from first and second moments.

  Args:
    zimg: [N, E]; rows that are not valid are 0.
    ztxt: [N, E]; the same.
    valid: [N] bool.

  Returns:
    centroid_distance, centroid_cosine: of the means of the modalities.
    mean_pair_distance, mean_pair_cosine, alignment (mean squared distance): of the pairs.
    mean_offdiag_cosine_*: within a modality, the cone effect.
    effective_rank_*: exp of the entropy of the singular values, of the rows and of the centred rows
      (https://arxiv.org/abs/2210.02885).
    linear_cka: similarity of the covariances (https://arxiv.org/abs/1905.00414).
  """
  n = valid.sum()
  mx, my = zimg.sum(0) / n, ztxt.sum(0) / n
  xc, yc = (jnp.where(valid[:, None], z - m[None], 0) for z, m in ((zimg, mx), (ztxt, my)))
  square = jnp.sum((zimg - ztxt) ** 2, -1)

  def products(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a.T, b, precision=HIGHEST)

  xx, yy, cxx, cyy = (products(z, z) for z in (zimg, ztxt, xc, yc))
  cka = jnp.sum(products(xc, yc) ** 2) / (jnp.linalg.norm(cxx) * jnp.linalg.norm(cyy))
  return {
    "centroid_distance": jnp.linalg.norm(mx - my),
    "centroid_cosine": jnp.sum(mx * my) / (jnp.linalg.norm(mx) * jnp.linalg.norm(my)),
    "mean_pair_distance": jnp.sqrt(square).sum() / n,
    "mean_pair_cosine": jnp.sum(zimg * ztxt) / n,
    "alignment": square.sum() / n,
    "mean_offdiag_cosine_img": (n * jnp.sum(mx * mx) - 1) / (n - 1),
    "mean_offdiag_cosine_txt": (n * jnp.sum(my * my) - 1) / (n - 1),
    "effective_rank_img": effective_rank(xx, n),
    "effective_rank_txt": effective_rank(yy, n),
    "effective_rank_joint": effective_rank(xx + yy, 2 * n),
    "effective_rank_img_centered": effective_rank(cxx, n - 1),
    "effective_rank_txt_centered": effective_rank(cyy, n - 1),
    "linear_cka": cka,
  }


def effective_rank(second: jax.Array, most: jax.Array) -> jax.Array:
  """Returns the effective rank of some rows.

  Args:
    second: [E, E], second moments of the rows.
    most: the largest rank that the rows can have.
  """
  square = jnp.linalg.eigvalsh(second)[::-1]
  # Without this cut, the roots of rounding errors would count.
  square = jnp.where(jnp.arange(len(square)) < most, jnp.maximum(square, 0), 0)
  p = jnp.sqrt(square) / jnp.sqrt(square).sum()
  return jnp.exp(jax.scipy.special.entr(p).sum())


def pairs(
  zimg: jax.Array, ztxt: jax.Array, valid: jax.Array, *, t: float = 2.0
) -> dict[str, jax.Array]:
  """Returns the metrics that need all N x N pairs, computed in tiles.

  Args:
    zimg: [N, E].
    ztxt: [N, E].
    valid: [N] bool.
    t: of the uniformity.

  Returns:
    uniformity_img, uniformity_txt: log of the mean of exp(-t |a - b|²) over the pairs of a modality
      (https://arxiv.org/abs/2005.10242). uniformity: their mean. uniformity_joint: over the pairs
      of both modalities together. xuniformity: over images and texts of different pairs.
    i2t_recall@k, t2i_recall@k: whether the partner is among the first k. Equal similarities rank
      after it, so a collapsed model scores 1; in the evaluator `retrieval` it scores chance.
  """
  engine = pairwise.DEFAULT  # not that of the run, whose precision is chosen for training
  own = engine.paired(zimg, ztxt)
  slack = 4 * jnp.finfo(zimg.dtype).eps  # equal up to rounding counts as equal

  def tile(row, col, shared):
    z = engine.products(row["img"], col["txt"])
    other = row["valid"][:, None] & col["valid"][None, :] & ~pairwise.same(row, col)

    def spread(cosine):
      return jnp.where(other, 2 * t * cosine, -jnp.inf)

    return {
      "img": spread(engine.products(row["img"], col["img"])),
      "txt": spread(engine.products(row["txt"], col["txt"])),
      "cross": spread(z),
      "i2t": (other & (z > row["own"][:, None] + slack)).astype(z.dtype),
      "t2i": (other & (z > col["own"][None, :] + slack)).astype(z.dtype),
    }

  side = {"img": zimg, "txt": ztxt, "own": own, "valid": valid}
  kinds = {"img": "row_lse", "txt": "row_lse", "cross": "row_lse", "i2t": "row_sum"}
  reduced = engine.reduce(tile, side, side, outputs={**kinds, "t2i": "col_sum"})
  n = valid.sum()
  img, txt, cross = (jax.nn.logsumexp(reduced[name]) for name in ("img", "txt", "cross"))
  paired = jax.nn.logsumexp(jnp.where(valid, 2 * t * own, -jnp.inf))
  once = jnp.log(n) + jnp.log(n - 1)  # ordered pairs
  twice = jnp.log(2 * n) + jnp.log(2 * n - 1)
  joint = jax.nn.logsumexp(jnp.stack([img, txt, cross + math.log(2), paired + math.log(2)]))
  out = {
    "uniformity_img": img - once - 2 * t,
    "uniformity_txt": txt - once - 2 * t,
    "uniformity": (img + txt) / 2 - once - 2 * t,
    "xuniformity": cross - once - 2 * t,
    "uniformity_joint": joint - twice - 2 * t,
  }
  for direction in ("i2t", "t2i"):
    before = reduced[direction]
    out |= {f"{direction}_recall@{k}": (valid & (before < k)).sum() / n for k in RECALL_AT}
  return out


def hubness(
  query: jax.Array, gallery: jax.Array, valid: jax.Array, nearest: int = NEAREST
) -> jax.Array:
  """Returns the skewness of how often each entry is among the nearest of the queries.

  0 if all are found equally often; large if few entries, the hubs, are found by many queries
  (https://jmlr.org/papers/v11/radovanovic10a.html). Of equal similarities the earlier entry is
  nearer; without any difference in the counts the skewness is 0.

  Args:
    query: [N, E].
    gallery: [N, E].
    valid: [N] bool, the rows that count, of both.
    nearest: entries that a query finds; fewer if there are fewer.
  """
  n, most = len(query), min(nearest, len(query))
  chunk = min(n, max(1, CHUNK // n))
  rest = -n % chunk
  given = [
    rearrange(jnp.pad(x, [(0, rest), *[(0, 0)] * (x.ndim - 1)]), "(k q) ... -> k q ...", q=chunk)
    for x in (query, valid)
  ]

  def add(counts: jax.Array, some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    sims = jnp.matmul(some[0], gallery.T, precision=HIGHEST)
    best, place = jax.lax.top_k(jnp.where(valid[None], sims, -jnp.inf), most)
    found = some[1][:, None] & (best > -jnp.inf)
    return counts.at[place.ravel()].add(found.ravel().astype(counts.dtype)), None

  counts = jax.lax.scan(add, jnp.zeros(n, jnp.int32), (given[0], given[1]))[0]
  centred = jnp.where(valid, counts - counts.sum() / valid.sum(), 0.0)
  variance = jnp.sum(centred**2) / valid.sum()
  third = jnp.sum(centred**3) / valid.sum()
  return jnp.where(variance > 0, third / jnp.maximum(variance, 1e-12) ** 1.5, 0.0)


def separability(
  zimg: jax.Array, ztxt: jax.Array, valid: jax.Array, train: jax.Array, *, c: float = 1.0
) -> dict[str, jax.Array]:
  """Returns how well a hyperplane separates images from texts: the modality gap as a classifier.

  Logistic regression, 1/2 |w|² + c · sum of log losses with a free intercept, fitted by Newton's
  method. linsep_test_accuracy is 0.5 without a gap.

  Args:
    zimg: [N, E].
    ztxt: [N, E].
    valid: [N] bool.
    train: [N] bool, pairs to fit; the others are for testing.
    c: inverse regularisation strength.
  """
  z = jnp.stack([zimg, ztxt])
  z = jnp.concatenate([z, jnp.ones_like(z[..., :1])], -1)  # [2, N, E + 1]
  sign = jnp.asarray([-1, 1], z.dtype)[:, None]
  fit = (valid & train).astype(z.dtype)[None]
  ridge = jnp.ones(z.shape[-1], z.dtype).at[-1].set(0)
  steps = jnp.asarray([0, *(0.5**k for k in range(12))], z.dtype)

  def objective(w: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.sum(ridge * w * w) / 2 + c * jnp.sum(fit * jax.nn.softplus(-sign * logits))

  def logits(w: jax.Array) -> jax.Array:
    return jnp.einsum("kne,e->kn", z, w, precision=HIGHEST)

  def newton(_: int, w: jax.Array) -> jax.Array:
    before = logits(w)
    p = jax.nn.sigmoid(-sign * before)
    gradient = ridge * w - c * jnp.einsum("kn,kne->e", fit * sign * p, z, precision=HIGHEST)
    weight = c * fit * p * (1 - p)
    curve = jnp.einsum("kne,kn,knf->ef", z, weight, z, precision=HIGHEST) + jnp.diag(ridge)
    direction = jnp.linalg.solve(curve, -gradient)
    along = logits(direction)
    objectives = jax.lax.map(lambda s: objective(w + s * direction, before + s * along), steps)
    updated: jax.Array = w + steps[jnp.argmin(objectives)] * direction
    return updated

  w = jax.lax.fori_loop(0, 20, newton, jnp.zeros(z.shape[-1], z.dtype))
  correct = (sign * logits(w) > 0) & (valid & ~train)[None]
  return {
    "linsep_test_accuracy": correct.sum() / (2 * (valid & ~train).sum()),
    "linsep_train_objective": objective(w, logits(w)),
    "linsep_weight_norm": jnp.linalg.norm(w[:-1]),
    "linsep_intercept": w[-1],
  }


def geometry(
  context: Context,
  *,
  source: str = "",
  fields: Sequence[str] | None = None,
  image_store: str = "",
  text_store: str = "",
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """The metrics of `measure` for the images of a source, each with its first caption.

  The classifier of images and texts is fitted to four fifths of the pairs: all but every fifth.

  >>> import jax.numpy as jnp
  >>> from bigalign import sharding
  >>> from bigalign.data.loader.options import resolve_data
  >>> def embed(params, batch, mask=None):  # a collapsed model: all embeddings are equal
  ...   return jnp.full((len(batch), 4), 0.5)
  >>> data = resolve_data(dict(image_size=32, tokenizer=dict(name="byte", length=48)))
  >>> context = Context("val", embed, embed, sharding.make_mesh(), data)
  >>> run = geometry(context, source="glyphs:heldout_dev")
  >>> metrics = run(params=None)
  >>> metrics["val/mean_pair_cosine"], metrics["val/num_samples"]
  (1.0, 1148.0)

  Args:
    context: model, mesh and data options.
    source: as in config.data.source; "" if both sides come from stores.
    fields: caption fields; None: config.data.captions.
    image_store: folder of the vectors of images, in place of their pixels, as of `retrieval`.
    text_store: folder of the vectors of captions, likewise.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>/centroid_distance": number, …}, and "num_samples".
  """
  data = open_data(
    context,
    source,
    batch_size=batch_size,
    captions=None,  # an image may have several, of which the first one counts
    fields=fields,
    image_store=image_store,
    text_store=text_store,
  )
  embed = embedder(context, data)

  @functools.partial(jax.jit, out_shardings=sharding.replicated_sharding(context.mesh))
  def find(embedded: Embedded) -> dict[str, jax.Array]:
    zimg = rearrange(embedded.zimg, "n b e -> (n b) e")
    ztxt = rearrange(embedded.ztxt[:, :, 0], "n b e -> (n b) e")
    valid = rearrange(embedded.valid & embedded.texts_valid[:, :, 0], "n b -> (n b)")
    train = rearrange(embedded.ordinal % 5 != 4, "n b -> (n b)")
    return {**measure(zimg, ztxt, train=train, valid=valid), "num_samples": valid.sum()}

  def run(params: Any) -> dict[str, float]:
    embedded = embed(params)
    with jax.set_mesh(context.mesh):
      metrics = sharding.block_on_cpu(find(embedded))
    if metrics["num_samples"] < 5:
      raise ValueError(
        f"config.evals.{context.name}: {metrics['num_samples']} of"
        f" {len(data.source)} samples can be used; geometry needs at least 5"
      )
    return {prefix(context.name) + name: float(value) for name, value in metrics.items()}

  return run
