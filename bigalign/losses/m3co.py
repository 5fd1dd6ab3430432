"""Softmax losses between mixed samples of one modality and those of the other."""

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
  """x[partner] for [B, ...] and [B] int, where no row leaves its of `parts` equal blocks."""
  blocks = rearrange(x, "(w b) e -> w b e", w=parts)
  own = rearrange(partner, "(w b) -> w b", w=parts) % blocks.shape[1]
  return rearrange(jax.vmap(lambda rows, i: rows[i])(blocks, own), "w b e -> (w b) e")


def draw(
  key: jax.Array, n: int, *, alpha: float, probability: float, parts: int
) -> tuple[jax.Array, jax.Array]:
  """Shares [n] and partners [n] of `m3co`, these within `parts` equal blocks; of 32 bits even under
  x64, which would draw other numbers."""
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
  """[]: rows of `a` [B, E], mixed before they are normalised, against those of `c` [B, E].

  Row i is share[i] of a[i] and the rest of a[partner[i]], and so is its target. `c` stays clean.
  """
  of_first = share[:, None]
  mixed = unit(of_first * a + (1 - of_first) * permuted(a, partner, parts))
  return two_positives(mixed, unit(c), scale, share, 1 - share, partner, engine=engine)


def soft_direction(
  a: jax.Array,
  c: jax.Array,
  scale: jax.Array,
  detach_targets: bool = False,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: logits of [B, E] and [B, E], both ways, against the targets softmax(scale c c^T)."""
  a, c = unit(a), unit(c)

  def kept(x):
    return jax.lax.stop_gradient(x) if detach_targets else x

  def of_targets(row, col, shared):
    return shared["scale"] * engine.products(kept(row["c"]), kept(col["c"]))

  def statistics(row, col, shared):
    z = engine.products(row["a"], col["c"])
    above = above_positives(z, row, col, shared["scale"])
    return {**above, "targets": of_targets(row, col, shared)}

  def expected(row, col, shared):
    """Targets times logits above the positive's, both ways; a positive adds 0."""
    z, own = engine.products(row["a"], col["c"]), of_targets(row, col, shared)
    forth = jnp.exp(own - row["norm"][:, None]) * (z - row["positive"][:, None])
    back = jnp.exp(own - col["norm"][None, :]) * (z - col["positive"][None, :])
    return {"both": jnp.where(pairwise.same(row, col), 0, shared["scale"] * (forth + back))}

  positive = engine.paired(a, c)
  rows, columns = {"a": a, "c": c, "positive": positive}, {"c": c, "positive": positive}
  found = engine.reduce(
    statistics,
    rows,
    columns,
    {"scale": scale},
    outputs={"i2t": "row_lse", "t2i": "col_lse", "targets": "row_lse"},
  )
  norm = {"norm": kept(found["targets"])}
  matched = engine.total(expected, rows | norm, columns | norm, {"scale": scale}) / len(a)
  return sum(jax.nn.softplus(found[k]).mean() for k in ("i2t", "t2i")) / 2 - matched / 2


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
  """Mixed images against texts, and mixed texts against images: https://arxiv.org/abs/2409.17777.

  Both directions are added. The modality that is not mixed stays clean, as in the paper; the
  authors' code mixes in place, so that it does not. The mixing is that of projections before they
  are normalised. The paper adds this to a classification loss with a weight of 0.1.

  Args:
    tau: fixed temperature.
    alpha: a sample keeps a share drawn from Beta(alpha, alpha) …
    probability: … with this probability, else all of itself.
    perm_scope: "global": partners are drawn from the whole batch, whose projections each device
      then gathers; "shard": from the same device, for no traffic. This is another distribution, and
      its draws depend on the number of devices.
    soft_after: share of training after which `softclip_m3co` takes over, with soft_tau and
      detach_targets; the authors' 0.33. None: never.
  """
  where = "config.loss.m3co"
  checks.known(f"{where}.perm_scope", perm_scope, PERM_SCOPES)
  if not alpha > 0:
    raise ValueError(f"{where}.alpha={alpha!r} of a Beta distribution: above 0")

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
  """Targets from within a modality: https://arxiv.org/abs/2409.17777.

  For images against texts, and texts against images, each both ways: targets are the softmax over
  the cosines of the second modality with itself. The two are added.

  Args:
    tau: fixed temperature, of logits and targets.
    detach_targets: no gradient through targets; in the authors' code there is one.
  """

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
