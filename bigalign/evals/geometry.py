"""The geometry of the sphere: how far apart the modalities lie, how evenly they are spread."""

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
  """All figures of N pairs; memory O(N E) and a tile, over the mesh that is set.

  Args:
    zimg, ztxt: [N, E], unit norm; row i of one belongs to row i of the other.
    train: [N] bool, pairs on which images and texts are separated; the others test it.
    valid: [N] bool, the pairs that count; None: all.
    uniformity_t, logreg_c: see `pairs` and `separability`.

  Returns:
    {name: []}; see `moments`, `pairs` and `separability`.
  """
  valid = jnp.ones(len(zimg), bool) if valid is None else valid
  zimg, ztxt = (jnp.where(valid[:, None], z, 0) for z in (zimg, ztxt))  # there may be NaN
  return {
    **moments(zimg, ztxt, valid),
    **pairs(zimg, ztxt, valid, t=uniformity_t),
    **separability(zimg, ztxt, valid, train, c=logreg_c),
  }


def moments(zimg: jax.Array, ztxt: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
  """What first and second moments tell of [N, E], [N, E]; where `valid` [N] is False they are 0.

  centroid_distance, centroid_cosine: of the modalities' means. mean_pair_distance,
  mean_pair_cosine, alignment (mean squared distance): of the pairs. mean_offdiag_cosine_*: within a
  modality, its cone. effective_rank_*: exp of the entropy of the singular values, of the rows as
  they are and about their mean (https://arxiv.org/abs/2210.02885). linear_cka: likeness of the two
  modalities' covariances (https://arxiv.org/abs/1905.00414).
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
  """[E, E] second moments of rows with at most that rank -> [], from their singular values."""
  square = jnp.linalg.eigvalsh(second)[::-1]
  # The roots of what is 0 but for rounding would count.
  square = jnp.where(jnp.arange(len(square)) < most, jnp.maximum(square, 0), 0)
  p = jnp.sqrt(square) / jnp.sqrt(square).sum()
  return jnp.exp(jax.scipy.special.entr(p).sum())


def pairs(
  zimg: jax.Array, ztxt: jax.Array, valid: jax.Array, *, t: float = 2.0
) -> dict[str, jax.Array]:
  """What all pairs of [N, E], [N, E] tell, where `valid` [N] is True, in tiles.

  uniformity_img, uniformity_txt: log of the mean of exp(-t |a - b|²) over the pairs of a modality
  (https://arxiv.org/abs/2005.10242), uniformity: their mean, uniformity_joint: over the pairs of
  both together, xuniformity: over images and texts that do not belong together. i2t_recall@k,
  t2i_recall@k: the own partner is among the first k, equal ones counted as behind it, so that a
  collapsed model has 1; the evaluator `retrieval` has chance there.
  """
  engine = pairwise.DEFAULT  # not the run's own, whose precision is chosen for training
  own = engine.paired(zimg, ztxt)
  slack = 4 * jnp.finfo(zimg.dtype).eps  # equal but for rounding is equal

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
  found = engine.reduce(tile, side, side, outputs={**kinds, "t2i": "col_sum"})
  n = valid.sum()
  img, txt, cross = (jax.nn.logsumexp(found[name]) for name in ("img", "txt", "cross"))
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
  for way in ("i2t", "t2i"):
    out |= {f"{way}_recall@{k}": (valid & (found[way] < k)).sum() / n for k in RECALL_AT}
  return out


def separability(
  zimg: jax.Array, ztxt: jax.Array, valid: jax.Array, train: jax.Array, *, c: float = 1.0
) -> dict[str, jax.Array]:
  """How well a plane parts images from texts, [N, E] each: the modality gap as a classifier.

  Logistic regression, 1/2 |w|² + c · sum of log losses, the intercept free, fitted by Newton's
  method to the pairs of `train` [N]; linsep_test_accuracy on the others is 0.5 without a gap.
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
    tried = jax.lax.map(lambda s: objective(w + s * direction, before + s * along), steps)
    return w + steps[jnp.argmin(tried)] * direction

  w = jax.lax.fori_loop(0, 20, newton, jnp.zeros(z.shape[-1], z.dtype))
  right = (sign * logits(w) > 0) & (valid & ~train)[None]
  return {
    "linsep_test_accuracy": right.sum() / (2 * (valid & ~train).sum()),
    "linsep_train_objective": objective(w, logits(w)),
    "linsep_weight_norm": jnp.linalg.norm(w[:-1]),
    "linsep_intercept": w[-1],
  }


def geometry(
  context: Context,
  *,
  source: str,
  fields: Sequence[str] | None = None,
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """The figures of `measure` of a source's images, each with its first caption.

  Images and texts are separated on four fifths of the pairs: all but every fifth of the source.

  Args:
    source: what open_source reads.
    fields: where the captions come from, as in config.data.captions, which holds if None.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>/centroid_distance": number, ...}, and "num_samples".
  """
  data = open_data(context, source, batch_size=batch_size, captions=1, fields=fields)
  embed = embedder(context, data)

  @functools.partial(jax.jit, out_shardings=sharding.replicated_sharding(context.mesh))
  def find(embedded: Embedded) -> dict[str, jax.Array]:
    zimg = rearrange(embedded.zimg, "n b e -> (n b) e")
    ztxt = rearrange(embedded.ztxt, "n b 1 e -> (n b) e")
    valid = rearrange(embedded.valid & embedded.texts_valid[:, :, 0], "n b -> (n b)")
    train = rearrange(embedded.ordinal % 5 != 4, "n b -> (n b)")
    return {**measure(zimg, ztxt, train=train, valid=valid), "num_samples": valid.sum()}

  def run(params: Any) -> dict[str, float]:
    embedded = embed(params)
    with jax.set_mesh(context.mesh):
      found = sharding.block_on_cpu(find(embedded))
    if found["num_samples"] < 5:
      raise ValueError(
        f"config.evals.{context.name}.source={source!r}: {found['num_samples']} of"
        f" {len(data.source)} samples can be used; their geometry takes at least 5"
      )
    return {prefix(context.name) + name: float(value) for name, value in found.items()}

  return run
