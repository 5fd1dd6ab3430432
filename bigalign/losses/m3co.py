"""Softmax losses between mixed samples of one modality and samples of the other (M3CoL)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks, sharding
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.mixup import two_positives
from bigalign.sphere import unit

PERM_SCOPES = ("global", "shard")


def permuted(x: jax.Array, partner: jax.Array, parts: int = 1) -> jax.Array:
  """x[partner], for [B, E] and [B] int; partners are in the same one of `parts` equal blocks."""
  blocks = rearrange(x, "(w b) e -> w b e", w=parts)
  own = rearrange(partner, "(w b) -> w b", w=parts) % blocks.shape[1]
  rows = jax.vmap(lambda block, i: block[i])(blocks, own)
  moved: jax.Array = rearrange(rows, "w b e -> (w b) e")
  return moved


def draw(
  key: jax.Array, n: int, *, alpha: float, probability: float, parts: int
) -> tuple[jax.Array, jax.Array]:
  """Draws the mixtures of `m3co`, in 32 bits even under x64, which would draw different numbers.

  Args:
    key: a JAX key.
    n: number of samples.
    alpha: of the Beta distribution of the shares.
    probability: that a sample is mixed.
    parts: number of equal blocks of the batch; partners are in the same block.

  Returns:
    [n] shares that samples keep, and [n] int32, their partners.
  """
  share, which, order = jax.random.split(key, 3)
  shares = jax.random.beta(share, alpha, alpha, (n,), jnp.float32)
  mixed = jax.random.uniform(which, (n,), jnp.float32) < probability
  own = jnp.argsort(jax.random.bits(order, (parts, n // parts), jnp.uint32), axis=1)
  first = jnp.arange(0, n, n // parts)[:, None]
  partner = rearrange(own + first, "w b -> (w b)").astype(jnp.int32)
  return jnp.where(mixed, shares, 1), partner


def mixed_direction(
  a: jax.Array,
  c: jax.Array,
  share: jax.Array,
  partner: jax.Array,
  scale: jax.Array,
  parts: int = 1,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: the softmax loss of mixed samples of one modality against the other, in both directions.

  Row i of the mixture is share[i] a[i] + (1 - share[i]) a[partner[i]], normalised. Its target has
  the same shares. `c` is not mixed.

  Args:
    a: [B, E], before normalisation.
    c: [B, E], before normalisation.
    share: [B].
    partner: [B] int32.
    scale: [], of the logits.
    parts: number of equal blocks of the batch; partners are in the same block.
    engine: forms the logits.
  """
  column = share[:, None]
  mixed = unit(column * a + (1 - column) * permuted(a, partner, parts))
  return two_positives(mixed, unit(c), scale, share, 1 - share, partner, engine=engine)


def soft_direction(
  a: jax.Array,
  c: jax.Array,
  scale: jax.Array,
  detach_targets: bool = False,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: the softmax loss with the targets softmax(scale c c^T), averaged over both directions.

  Args:
    a: [B, E], before normalisation.
    c: [B, E], before normalisation.
    scale: [], of the logits and of the targets.
    detach_targets: whether targets get no gradient.
    engine: forms the logits.
  """
  a, c = unit(a), unit(c)

  def kept(x):
    return jax.lax.stop_gradient(x) if detach_targets else x

  def of_targets(row, col, shared):
    return shared["scale"] * engine.products(kept(row["c"]), kept(col["c"]))

  def logits(row, col, shared):
    z = engine.products(row["a"], col["c"])
    above = above_positives(z, row, col, shared["scale"])
    return {**above, "targets": of_targets(row, col, shared)}

  def expected(row, col, shared):
    """Targets times logits relative to the positive's, in both directions; a positive adds 0."""
    z, own = engine.products(row["a"], col["c"]), of_targets(row, col, shared)
    forward = jnp.exp(own - row["norm"][:, None]) * (z - row["positive"][:, None])
    backward = jnp.exp(own - col["norm"][None, :]) * (z - col["positive"][None, :])
    return {"both": jnp.where(pairwise.same(row, col), 0, shared["scale"] * (forward + backward))}

  positive = engine.paired(a, c)
  rows, columns = {"a": a, "c": c, "positive": positive}, {"c": c, "positive": positive}
  reduced = engine.reduce(
    logits,
    rows,
    columns,
    {"scale": scale},
    outputs={"i2t": "row_lse", "t2i": "col_lse", "targets": "row_lse"},
  )
  norm = {"norm": kept(reduced["targets"])}
  matched = engine.total(expected, rows | norm, columns | norm, {"scale": scale}) / len(a)
  return sum(jax.nn.softplus(reduced[k]).mean() for k in ("i2t", "t2i")) / 2 - matched / 2


def m3co(
  *,
  tau: float = 0.1,
  alpha: float = 0.15,
  probability: float = 0.5,
  perm_scope: str = "global",
  soft_after: float | None = 0.33,
  soft_tau: float = 0.125,
  detach_targets: bool = False,
) -> Loss:
  """Mixed images against texts plus mixed texts against images: https://arxiv.org/abs/2409.17777.

  The other modality is not mixed, as in the paper; the authors' code mixes in place, so that it
  mixes both. Projections are mixed before they are normalised. The paper adds this loss to a
  classification loss, with a weight of 0.1.

  Args:
    tau: fixed temperature.
    alpha: a mixed sample keeps a share drawn from Beta(alpha, alpha).
    probability: that a sample is mixed.
    perm_scope: "global": partners are drawn from the whole batch, so each device gathers all
      projections. "shard": partners are drawn from the same device, without communication; this is
      a different distribution, and its draws depend on the number of devices.
    soft_after: share of training after which the loss is `softclip_m3co`; 0.33 in the authors'
      code. None: never.
    soft_tau: temperature of `softclip_m3co`.
    detach_targets: as in `softclip_m3co`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> feats = {"raw_img": 3 * jnp.eye(4), "raw_txt": 2 * jnp.eye(4)}
    >>> metrics = apply_once(m3co(tau=1.0, probability=0.0), feats)  # nothing is mixed: twice CLIP
    >>> round(float(metrics["loss"]), 3)
    1.487
  """
  where = "config.loss.m3co"
  checks.known(f"{where}.perm_scope", perm_scope, PERM_SCOPES)
  checks.above_zero(where, tau=tau, soft_tau=soft_tau)
  checks.between(where, 0, 1, probability=probability)
  if soft_after is not None:
    checks.between(where, 0, 1, soft_after=soft_after)
  if not alpha > 0:
    raise ValueError(
      f"{where}.alpha={alpha!r} is a parameter of a Beta distribution; it must be above 0"
    )

  def apply(params, state, feats, batch, context):
    img, txt = feats["raw_img"], feats["raw_txt"]
    parts = sharding.batch_parts() if perm_scope == "shard" else 1

    def mixed():
      scale = jnp.asarray(1 / tau, img.dtype)
      loss = jnp.zeros((), img.dtype)
      for key, a, c in zip(jax.random.split(context.key), (img, txt), (txt, img)):
        share, partner = draw(key, len(a), alpha=alpha, probability=probability, parts=parts)
        loss += mixed_direction(
          a, c, share.astype(a.dtype), partner, scale, parts, engine=context.engine
        )
      return loss

    def soft():
      scale = jnp.asarray(1 / soft_tau, img.dtype)
      return sum(
        soft_direction(a, c, scale, detach_targets, engine=context.engine)
        for a, c in ((img, txt), (txt, img))
      )

    loss = (
      mixed() if soft_after is None else jax.lax.cond(context.progress < soft_after, mixed, soft)
    )
    return loss, (state, {"loss": loss})

  return Loss(frozenset({"raw"}), lambda sizes: ({}, {}), apply)


def softclip_m3co(*, tau: float = 0.125, detach_targets: bool = False) -> Loss:
  """The softmax loss with targets from within a modality: https://arxiv.org/abs/2409.17777.

  The sum of two terms, images against texts and texts against images, each averaged over both
  directions. The targets are the softmax over the cosines of the second modality with itself.

  Args:
    tau: fixed temperature of logits and targets.
    detach_targets: whether targets get no gradient; in the authors' code they get one.

  Example:
    >>> from bigalign.losses import apply_once
    >>> feats = {"raw_img": 3 * jnp.eye(4), "raw_txt": 2 * jnp.eye(4)}
    >>> metrics = apply_once(softclip_m3co(tau=1.0), feats)  # the entropy of the targets
    >>> round(float(metrics["img_to_txt"]), 3)
    1.268
  """
  checks.above_zero("config.loss.softclip_m3co", tau=tau)

  def apply(params, state, feats, batch, context):
    img, txt = feats["raw_img"], feats["raw_txt"]
    scale = jnp.asarray(1 / tau, img.dtype)
    parts = {
      "img_to_txt": soft_direction(img, txt, scale, detach_targets, engine=context.engine),
      "txt_to_img": soft_direction(txt, img, scale, detach_targets, engine=context.engine),
    }
    loss = sum(parts.values())
    return loss, (state, {"loss": loss, **parts})

  return Loss(frozenset({"raw"}), lambda sizes: ({}, {}), apply)
