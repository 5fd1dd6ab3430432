"""SogCLR and iSogCLR: softmax contrast against all samples of the data, by moving averages."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import schedules
from bigalign.losses.base import Loss, others
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.per_sample import global_contrastive, tables

VARIANTS = ("paper", "released")
RELEASED_EPS = 1e-10


def sogclr(
  *,
  tau: float = 0.01,
  gamma: float = 0.8,
  variant: str = "paper",
  eps: float | None = None,
  texts: str = "one",
) -> Loss:
  """Global contrastive loss for small batches: SogCLR, https://arxiv.org/abs/2202.12387.

  The objective is tau times the mean of log u over images plus that over texts, logged as
  "objective". "loss" is the value that the released code prints, the sum of w A over both sides, a
  surrogate that says little about progress.

  Args:
    tau: temperature, constant. 0.01 is the bimodal script's; the class of the release has 0.07.
    gamma: weight of the new value in the moving average of u; 1 ignores earlier values. 0.8 is the
      bimodal script's; the class has 0.1.
    variant: "paper": negatives are the other samples, and u = g the first time a sample is in a
      batch. "released": as in the authors' bimodal code, the positive stays in the sum (its mask is
      computed but not used), u starts at 0, which makes the first weights too large by 1 / gamma,
      and rows with the same id are all weighted by the u of the last one, which can make the
      gradient of the others very large. The default is the paper, whose gradient with gamma = 1 is
      that of the objective.
    eps: added to u, in units of exp(b), where b is the largest exponent so far, one more float per
      sample. None: 0 for "paper", 1e-10 for "released".
    texts: "one": an image has one text, ztxt. "set": it has several, ztxts [B, M, E] with
      texts_kind [B, M], which are one anchor and share a u, found by image_id; see
      per_sample/global_contrastive.py. Only with the variant "paper".

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, ids = jnp.eye(4), jnp.asarray([[0, 0], [0, 1], [0, 2], [0, 3]], jnp.uint32)
    >>> batch, sizes = {"image_id": ids, "text_id": ids}, {"image": 4, "text": 4}
    >>> metrics = apply_once(sogclr(tau=0.5), {"zimg": z, "ztxt": z}, batch, sizes)
    >>> round(float(metrics["objective"]), 3)  # 2 tau log(exp(-1 / tau))
    -2.0
  """
  eps = _checked("sogclr", variant, gamma, eps, texts)
  checks.above_zero("config.loss.sogclr", tau=tau)

  def init(sizes):
    fills = {"b": 0.0} if eps else {}
    sizes = global_contrastive.sizes_of(sizes, texts)
    return {}, global_contrastive.make_tables(sizes, log_u=-math.inf, **fills)

  def apply(params, state, feats, batch, context):
    zimg = feats["zimg"]
    ztxt, batch = global_contrastive.anchors(feats, batch, texts)
    old = global_contrastive.read_tables(state, batch)
    taus = global_contrastive.each(lambda x: jnp.full_like(x["log_u"], tau), old)
    log_g, top = global_contrastive.means(zimg, ztxt, taus, engine=context.engine)
    state, now = _update(state, batch, old, log_g, top, gamma, variant)
    log_den = global_contrastive.each(
      lambda x: global_contrastive.with_eps(x["log_u"], eps, x.get("b", 0.0)), now
    )
    loss = global_contrastive.weighted_both(zimg, ztxt, taus, log_den, log_g, engine=context.engine)
    objective = tau * global_contrastive.both(global_contrastive.each(lambda x: x["log_u"], now))
    logs = {"loss": loss, "objective": objective, "finite_state": global_contrastive.is_finite(now)}
    return loss, (state, logs)

  return Loss(global_contrastive.needs(texts), init, apply, per_sample_state=True)


def isogclr(
  *,
  tau_init: float = 0.01,
  tau_min: float = 0.005,
  tau_max: float = 1.0,
  rho: float | Mapping[str, Any] = 6.0,
  gamma: float = 0.8,
  eta: float = 0.03,
  eta_min: float = 1e-4,
  eta_schedule: str = "constant",
  eta_over: int | str | None = None,
  eta_decay: float = 0.8,
  beta: float = 0.9,
  grad_clip: float = 5.0,
  variant: str = "paper",
  eps: float | None = None,
  texts: str = "one",
) -> Loss:
  """SogCLR with a learned temperature per sample: iSogCLR, https://arxiv.org/abs/2305.11965.

  "objective" is the mean of tau_i (log u_i + rho) over images plus that over texts; "loss" is that
  of `sogclr`. The temperatures are state, not parameters: a sample's temperature changes each time
  it is in a batch.

  Args:
    tau_init: first temperature of every sample; the script's. The class of the release has 0.07.
    tau_min: lower bound of the temperatures.
    tau_max: upper bound of the temperatures.
    rho: how far from uniform the weights of the negatives may be; a larger one keeps tau smaller. 6
      is the script's; the command line's default is 8, the class's 0.1. A number, or a
      schedules.ramp.
    gamma: as in `sogclr`.
    eta: first step size of the temperatures. 0.03 is the script's, 1e-3 the command line's.
    eta_min: last step size, for the schedules that change it.
    eta_schedule: "constant", "cosine" or "exponential", see schedules.eta.
    eta_over: duration of the schedule; None: the whole training ("cosine") or one epoch
      ("exponential").
    eta_decay: factor of the exponential schedule.
    beta: weight of the *new* gradient in a temperature's momentum, unlike the usual convention.
    grad_clip: bound of a temperature's gradient.
    variant: as in `sogclr`.
    eps: as in `sogclr`.
    texts: as in `sogclr`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, ids = jnp.eye(4), jnp.asarray([[0, 0], [0, 1], [0, 2], [0, 3]], jnp.uint32)
    >>> batch, sizes = {"image_id": ids, "text_id": ids}, {"image": 4, "text": 4}
    >>> metrics = apply_once(isogclr(tau_init=0.5), {"zimg": z, "ztxt": z}, batch, sizes)
    >>> round(float(metrics["objective"]), 3)  # 2 tau (log(exp(-1 / tau)) + rho)
    4.0
  """
  eps = _checked("isogclr", variant, gamma, eps, texts)
  where = "config.loss.isogclr"
  checks.above_zero(where, tau_init=tau_init, tau_min=tau_min, tau_max=tau_max)
  checks.above_zero(where, grad_clip=grad_clip)
  checks.above_zero(where, most=1.0, eta_decay=eta_decay, beta=beta)
  checks.between(where, 0, eta=eta, eta_min=eta_min)
  global_contrastive.check_bounds(where, tau_init, tau_min, tau_max)
  periods = {"constant": "100%", "cosine": "100%", "exponential": "1 epoch"}
  checks.known(f"{where}.eta_schedule", eta_schedule, periods)
  length = periods[eta_schedule] if eta_over is None else eta_over
  over = schedules.duration(length, f"{where}.eta_over")
  robust = schedules.ramp(rho, f"{where}.rho")

  def init(sizes):
    fills = {"b": 0.0} if eps else {}
    sizes = global_contrastive.sizes_of(sizes, texts)
    return {}, global_contrastive.make_tables(sizes, log_u=-math.inf, tau=tau_init, m=0.0, **fills)

  def moved(rate, rho, old, log_u, pull):
    """The next momentum and temperature of each anchor [B]."""
    q = jnp.clip(log_u + rho - pull / old["tau"], -grad_clip, grad_clip)
    m = (1 - beta) * old["m"] + beta * q
    return {"m": m, "tau": jnp.clip(old["tau"] - rate * m, tau_min, tau_max)}

  def apply(params, state, feats, batch, context):
    zimg = feats["zimg"]
    ztxt, batch = global_contrastive.anchors(feats, batch, texts)
    rate = schedules.eta(eta_schedule, eta, eta_min, over, eta_decay, context)
    old = global_contrastive.read_tables(state, batch)
    taus = global_contrastive.each(lambda x: x["tau"], old)
    log_g, top = global_contrastive.means(zimg, ztxt, taus, engine=context.engine)
    state, now = _update(state, batch, old, log_g, top, gamma, variant)
    log_u = global_contrastive.each(lambda x: x["log_u"], now)
    log_den = global_contrastive.each(
      lambda x: global_contrastive.with_eps(x["log_u"], eps, x.get("b", 0.0)), now
    )
    pulls = global_contrastive.weighted(zimg, ztxt, taus, log_den, log_g, engine=context.engine)
    step = functools.partial(moved, rate, robust(context))
    new = global_contrastive.each(step, old, log_u, jax.lax.stop_gradient(pulls))
    state, _ = global_contrastive.write_tables(state, batch, new)
    loss = global_contrastive.both(pulls)
    objective = global_contrastive.both(
      global_contrastive.each(lambda t, u: t * (u + robust(context)), taus, log_u)
    )
    logs = {f"tau_{side}": x.mean() for side, x in taus.items()}
    logs["finite_state"] = global_contrastive.is_finite(now, new)
    return loss, (state, {"loss": loss, "objective": objective, "eta": rate, **logs})

  return Loss(global_contrastive.needs(texts), init, apply, per_sample_state=True)


def sogclr_unimodal(*, tau: float = 0.1, gamma: float = 0.9) -> Loss:
  """SogCLR between two views of a sample: https://arxiv.org/abs/2202.12387.

  The views are the outputs of the two towers, here of one modality. An anchor's negatives are the
  other samples in both views, 2 (B - 1) of them. The two views share one u, found by image_id.
  "loss" is in units of similarity: it is not divided by tau.

  There is no form for several texts per image: the loss compares samples within each view too, and
  captions are no view of an image in its own modality. `sogclr` takes several captions.

  Args:
    tau: temperature, constant.
    gamma: weight of the new value in the moving average of u; tune it between 0.1 and 0.99. It is 1
      for a batch in which every sample is new.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, ids = jnp.eye(4), jnp.asarray([[0, 0], [0, 1], [0, 2], [0, 3]], jnp.uint32)
    >>> batch = {"image_id": ids}
    >>> metrics = apply_once(sogclr_unimodal(), {"zimg": z, "ztxt": z}, batch, {"image": 4})
    >>> round(float(metrics["loss"]), 3)
    -2.0
  """
  checks.above_zero("config.loss.sogclr_unimodal", tau=tau)
  checks.above_zero("config.loss.sogclr_unimodal", most=1.0, gamma=gamma)

  def init(sizes):
    return {}, {"log_u": tables.make(sizes["image"], -math.inf)}

  def apply(params, state, feats, batch, context):
    x, y, engine = feats["zimg"], feats["ztxt"], context.engine
    old = tables.read(state, batch["image_id"])["log_u"]
    weight = jnp.where(jnp.isneginf(old).all(), 1.0, gamma)
    log_g = _view_means(x, y, tau, engine)
    log_u = {k: global_contrastive.average(old, v, weight, None) for k, v in log_g.items()}
    mean = jnp.logaddexp(log_u["x"], log_u["y"]) - math.log(2)
    state, _ = tables.write(state, batch["image_id"], {"log_u": mean})

    def tile(row, col, shared):
      other = ~pairwise.same(row, col)

      def pulled(name, s, of):
        w = jnp.where(other, jnp.exp(s / tau - of), 0)
        return {name: jax.lax.stop_gradient(w) * s}

      xy, xx, yy = _view_products(row, col, engine)
      return (
        pulled("xy", xy, row["x_log_u"][:, None])
        | pulled("yx", xy, col["y_log_u"][None, :])
        | pulled("xx", xx, row["x_log_u"][:, None])
        | pulled("yy", yy, row["y_log_u"][:, None])
      )

    views = {"x": x, "y": y, **{f"{k}_log_u": u for k, u in log_u.items()}}
    b = len(x)
    fixed = ("x_log_u", "y_log_u")
    pull = engine.total(tile, views, views, fixed=fixed) / (2 * b * (b - 1))
    loss = pull - 2 * engine.paired(x, y).mean()
    finite = global_contrastive.is_finite(log_u)
    return loss, (state, {"loss": loss, "finite_state": finite})

  return Loss(frozenset({"ids"}), init, apply, per_sample_state=True)


def _view_products(row: Any, col: Any, engine: Engine) -> tuple[jax.Array, jax.Array, jax.Array]:
  """[n, m] each: the products between the views, and within each view."""
  xy, xx, yy = (engine.products(row[a], col[b]) for a, b in ("xy", "xx", "yy"))
  return xy, xx, yy


def _view_means(x: jax.Array, y: jax.Array, tau: float, engine: Engine) -> dict[str, jax.Array]:
  """{"x": [B], "y": [B]}: log g of the anchors of each view, without a gradient."""
  views = jax.lax.stop_gradient({"x": x, "y": y})

  def tile(row, col, shared):
    other = ~pairwise.same(row, col)
    xy, xx, yy = (jnp.where(other, s / tau, -jnp.inf) for s in _view_products(row, col, engine))
    return {"xy": xy, "yx": xy, "xx": xx, "yy": yy}

  lse = engine.reduce(
    tile, views, views, outputs=dict(xy="row_lse", yx="col_lse", xx="row_lse", yy="row_lse")
  )
  log_others = math.log(2 * others(len(x)))
  return {
    "x": jnp.logaddexp(lse["xy"], lse["xx"]) - log_others,
    "y": jnp.logaddexp(lse["yx"], lse["yy"]) - log_others,
  }


def _checked(name: str, variant: str, gamma: float, eps: float | None, texts: str) -> float:
  """Checks options that two losses share; returns eps, by default that of the variant."""
  global_contrastive.check_texts(name, texts)
  if texts != "one" and variant != "paper":
    raise ValueError(
      f"config.loss.{name}.variant={variant!r} is defined for one text per image; set"
      f" variant='paper' for texts={texts!r}"
    )
  checks.known(f"config.loss.{name}.variant", variant, VARIANTS)
  checks.above_zero(f"config.loss.{name}", most=1.0, gamma=gamma)
  if eps is None:
    return RELEASED_EPS if variant == "released" else 0.0
  checks.between(f"config.loss.{name}", 0, eps=eps)
  return eps


def _update(
  state: Any,
  batch: Mapping[str, jax.Array],
  old: Any,
  log_g: global_contrastive.Anchors,
  top: global_contrastive.Anchors,
  gamma: float,
  variant: str,
) -> tuple[Any, Any]:
  """Updates u, and b if there is one, with the batch.

  Returns:
    The state, and the values {side: {name: [B]}} that weight each row. If an id occurs several
    times, the state keeps the values of its last row. "paper" weights each row by its own values,
    "released" by those in the state: its gradient can be very large, because the u of the last row
    can be far smaller than the g of another one.
  """
  positive = -math.log(len(log_g["img"]) - 1)  # log of exp(0) / (B - 1)

  def updated(old, log_g, top):
    if variant == "released":
      new = {
        "log_u": global_contrastive.average(
          old["log_u"], jnp.logaddexp(log_g, positive), gamma, None
        )
      }
    else:
      fresh = jnp.isneginf(old["log_u"])
      new = {"log_u": global_contrastive.average(old["log_u"], log_g, gamma, fresh)}
    return new | ({"b": jnp.maximum(old["b"], top)} if "b" in old else {})

  own = global_contrastive.each(updated, old, log_g, top)
  state, last = global_contrastive.write_tables(state, batch, own)
  return state, last if variant == "released" else own
