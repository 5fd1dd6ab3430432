"""Global contrast steered by a reference model (DRRho)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import schedules
from bigalign.losses.base import Loss, others
from bigalign.losses.distill import (
  StoredTeachers,
  constant,
  fields_of,
  needs_of,
  soft_targets,
)
from bigalign.losses.per_sample import global_contrastive
from bigalign.losses.per_sample.fastclip import TAU_BOUNDS
from bigalign.losses.texts import Texts, flat


def drrho(
  *,
  tau: float = 0.01,
  tau_learned: bool = False,
  rho: float = 11.0,
  gamma: float = 1.0,
  gamma_schedule: str = "cosine",
  gamma_over: int | str = "50%",
  eps: float = 1e-4,
  w_distill: float = 0.0,
  teacher_dims: Sequence[int] | None = None,
  teacher_scales: Sequence[float] | None = None,
  texts: str = "one",
) -> Loss:
  """Contrast of excess similarities over a reference: DRRho-CLIP, https://arxiv.org/abs/2505.06699.

  With S the cosines of the model and R those of the reference, anchor i and candidate j have the
  exponent h_ij = (S_ij - S_ii - R_ij + R_ii) / tau: a pair that the reference finds hard, too, has
  little weight. As in the release, u is the mean of eps and of the sum over j of exp(h_ij) / B, and
  both directions are summed; "contrastive_loss" is the value that the release logs. The batch holds
  the unit embeddings of the reference, teacher_img and teacher_txt [B, D]; of several teachers, R
  is the mean.

  Args:
    tau: temperature, between 0.01 and 1; first value of a learned one.
    tau_learned: whether tau is learned; the parameter "t" is the log of its inverse, kept in
      [0, ln 100]. Its gradient is that of the release.
    rho: how far from uniform the weights of the negatives may be; without effect if tau is
      constant.
    gamma: last weight of the new value in the moving average of u. With 1, the default of the
      release, there is no state and no id is read. For E epochs, the authors' rule for smaller ones
      is min(1, 4.177 E^-0.7265).
    gamma_schedule: as in `fastclip_v0`.
    gamma_over: as in `fastclip_v0`.
    eps: added to the mean that u follows.
    w_distill: weight of the cross-entropy to the softmax of the reference, times tau.
    teacher_dims: as in `mobileclip_dr`.
    teacher_scales: the logit scale of each teacher in that term, whose probabilities are averaged.
      None: 100.
    texts: "one": an image has one text, ztxt. "set": it has several, ztxts [B, M, E], with the
      teacher's teacher_txts [B, M, D]: they are one anchor, as in `sogclr`, whose exponents are
      those above; the cross-entropy is the mean over texts of `clip_distill`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # the reference is as good: all exponents are 0
    >>> batch = {"teacher_img": z, "teacher_txt": z}
    >>> metrics = apply_once(drrho(tau=0.5, rho=0.0, eps=0.5), {"zimg": z, "ztxt": z}, batch)
    >>> round(float(metrics["loss"]), 3)  # tau / 2 * 2 * log(3 / 4 + 1 / 2)
    0.112
  """
  where = "config.loss.drrho"
  checks.between(where, *TAU_BOUNDS, tau=tau)
  checks.above_zero(where, eps=eps)
  checks.between(where, 0, w_distill=w_distill)
  checks.above_zero(where, most=1.0, gamma=gamma)
  checks.known(f"{where}.gamma_schedule", gamma_schedule, ("cosine", "constant"))
  length = schedules.duration(gamma_over, f"{where}.gamma_over")
  global_contrastive.check_texts("drrho", texts)
  average = gamma < 1
  stored = StoredTeachers("drrho", teacher_dims, teacher_scales)

  def init(sizes):
    stored.check(sizes)
    params = {"t": jnp.asarray(-math.log(tau), jnp.float32)} if tau_learned else {}
    if not average:
      return params, {}
    sizes = global_contrastive.sizes_of(sizes, texts)
    return params, global_contrastive.make_tables(sizes, log_u=-math.inf)

  def apply(params, state, feats, batch, context):
    zimg, engine = feats["zimg"], context.engine
    ztxt, batch = global_contrastive.anchors(feats, batch, texts)
    teachers = stored.of_batch(batch, context.sizes, texts=fields_of(texts))
    if isinstance(ztxt, Texts):
      # An absent text is some vector, even one that is not finite.
      known = jnp.where(ztxt.present[..., None], batch["teacher_txts"], 0)
      form, theirs = "per_ordinal", flat(known)
    else:  # of several, too, if there is one
      theirs = batch["teacher_txt"] if texts == "one" else batch["teacher_txts"][:, 0]
      form = "one"
      feats, batch = {**feats, "ztxt": ztxt}, {**batch, "teacher_txt": theirs}
    img, txt = (constant(x, zimg) for x in (batch["teacher_img"], theirs))
    share = math.sqrt(len(teachers))
    reference = (img / share, txt / share)  # whose products are the mean of the teachers' cosines
    fixed = jax.lax.stop_gradient(params["t"]) if params else None
    now = jnp.asarray(tau, zimg.dtype) if fixed is None else jnp.exp(-fixed)
    taus = {side: jnp.full(len(zimg), now) for side in ("img", "txt")}
    means, _ = global_contrastive.means(zimg, ztxt, taus, reference, engine=engine)
    # The mean of the release divides by B, of which it counts B - 1.
    size = len(zimg)
    part = math.log(others(size) / size)
    log_g = global_contrastive.each(lambda g: global_contrastive.with_eps(g + part, eps), means)
    log_u, weight = log_g, jnp.ones((), zimg.dtype)
    if average:
      weight = schedules.gamma(gamma_schedule, gamma, length, context)
      old = global_contrastive.read_tables(state, batch)
      log_u = global_contrastive.each(
        lambda x, g: global_contrastive.average(x["log_u"], g, weight, jnp.isneginf(x["log_u"])),
        *(old, log_g),
      )
      rows = global_contrastive.each(lambda u: {"log_u": u}, log_u)
      state, _ = global_contrastive.write_tables(state, batch, rows)
    pull = global_contrastive.weighted_both(
      zimg, ztxt, taus, log_u, means, reference, engine=engine
    )
    entropy = global_contrastive.both(log_u)
    loss = pull + now * (rho + entropy / 2)
    surrogate = pull
    if params:
      # With the weights fixed, the derivative of pull / tau, and of tau, by "t".
      slope = jax.lax.stop_gradient(pull) - now * (rho + entropy / 2)
      surrogate += slope * params["t"]
    logs = {"contrastive_loss": loss, "gamma": weight, "logit_scale": 1 / now}
    total = global_contrastive.with_slope(loss, surrogate)
    if w_distill:
      scale = jnp.exp(params["t"]) if params else 1 / now
      soft = soft_targets(feats, batch, scale, teachers, form, engine=engine)
      logs["distill_loss"] = w_distill * now * soft
      total += logs["distill_loss"]
    logs["finite_state"] = global_contrastive.is_finite(log_u)
    return total, (state, {"loss": total, **logs})

  def constrain(params, before):
    return {k: jnp.clip(x, 0.0, math.log(100)) for k, x in params.items()}

  needs = needs_of(texts) | ({"ids"} if average else set())
  return Loss(needs, init, apply, constrain, per_sample_state=average)
