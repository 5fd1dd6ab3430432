"""FastCLIP: global contrast with a scheduled moving average and learned temperatures."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import schedules
from bigalign.losses.base import Loss
from bigalign.losses.per_sample import global_contrastive

LOG_TINY = math.log(1e-35)  # below it, the released code restarts u
TAU_BOUNDS = (0.01, 1.0)  # of a learned temperature
GRADIENTS = ("released", "consistent")
WEIGHTINGS = ("released", "rgcl")


def fastclip_v0(
  *,
  tau_init: float = 0.07,
  tau_gradient: str = "released",
  gamma: float = 0.2,
  gamma_schedule: str = "cosine",
  gamma_over: int | str = "50%",
  eps: float = 1e-14,
  texts: str = "one",
) -> Loss:
  """Global contrast with one learned temperature: FastCLIP v0, https://arxiv.org/abs/2407.01445.

  "loss" is the value that the released code prints, the mean of g / (u + eps) over images plus that
  over texts; it stays close to 2. "objective" is half the mean of log(u + eps) over images plus
  that over texts.

  Args:
    tau_init: first temperature, between 0.01 and 1; the learned parameter "t" is the log of its
      inverse, kept in [0, ln 100].
    tau_gradient: "released": the temperature's gradient is twice as large as it is in the objective
      of the features; "consistent": it is the derivative of that objective.
    gamma: last weight of the new value in the moving average of u; 0.2 for a few million pairs, 0.8
      for LAION-400M.
    gamma_schedule: "cosine", from 1 to gamma, or "constant"; both are 1 in the first epoch, see
      schedules.gamma.
    gamma_over: duration of the cosine; about half of the epochs in the paper.
    eps: added to u; 1e-6 at LAION's scale. It does not guard against rounding: anchors with a u far
      below it get no weight.
    texts: "one": an image has one text, ztxt. "set": it has several, ztxts [B, M, E] with
      texts_kind [B, M], which are one anchor and share a u, found by image_id; see
      per_sample/global_contrastive.py.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, ids = jnp.eye(4), jnp.asarray([[0, 0], [0, 1], [0, 2], [0, 3]], jnp.uint32)
    >>> batch, sizes = {"image_id": ids, "text_id": ids}, {"image": 4, "text": 4}
    >>> metrics = apply_once(fastclip_v0(tau_init=0.5), {"zimg": z, "ztxt": z}, batch, sizes)
    >>> round(float(metrics["loss"]), 3), round(float(metrics["objective"]), 3)
    (2.0, -2.0)
  """
  checks.known("config.loss.fastclip_v0.tau_gradient", tau_gradient, GRADIENTS)

  def gradient(tau, sums):
    return sums["h"] if tau_gradient == "released" else sums["h"] / 2

  checks.between("config.loss.fastclip_v0", *TAU_BOUNDS, tau_init=tau_init)
  averaged = _schedule("fastclip_v0", gamma_schedule, gamma, gamma_over, eps, texts)
  return _one_temperature(tau_init, gradient, averaged, eps, texts)


def fastclip_v1(
  *,
  tau: float = 0.07,
  gamma: float = 0.2,
  gamma_schedule: str = "cosine",
  gamma_over: int | str = "50%",
  eps: float = 1e-14,
  texts: str = "one",
) -> Loss:
  """Global contrast with a constant temperature: FastCLIP v1, https://arxiv.org/abs/2407.01445.

  The gradient is that of SogCLR, divided by 2 tau. "loss" and "objective" are those of
  `fastclip_v0`.

  Args:
    tau: temperature, constant.
    gamma: as in `fastclip_v0`.
    gamma_schedule: as in `fastclip_v0`.
    gamma_over: as in `fastclip_v0`.
    eps: as in `fastclip_v0`.
    texts: as in `fastclip_v0`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, ids = jnp.eye(4), jnp.asarray([[0, 0], [0, 1], [0, 2], [0, 3]], jnp.uint32)
    >>> batch, sizes = {"image_id": ids, "text_id": ids}, {"image": 4, "text": 4}
    >>> metrics = apply_once(fastclip_v1(tau=0.5), {"zimg": z, "ztxt": z}, batch, sizes)
    >>> round(float(metrics["objective"]), 3)
    -2.0
  """
  checks.above_zero("config.loss.fastclip_v1", tau=tau)
  averaged = _schedule("fastclip_v1", gamma_schedule, gamma, gamma_over, eps, texts)
  return _one_temperature(tau, None, averaged, eps, texts)


def fastclip_v3(
  *,
  tau_init: float = 0.07,
  rho: float | Mapping[str, Any] = 6.5,
  slow_below: float = 0.03,
  tau_gradient: str = "released",
  gamma: float = 0.2,
  gamma_schedule: str = "cosine",
  gamma_over: int | str = "50%",
  eps: float = 1e-14,
  texts: str = "one",
) -> Loss:
  """Robust global contrast, one learned temperature: FastCLIP v3, https://arxiv.org/abs/2407.01445.

  "loss" is the value that the released code prints; "objective" is tau / 2 times the mean of
  log(u + eps) + rho over images plus that over texts. In the release, the temperature has a
  constant learning rate of its own, 2e-4 to 5e-5:
  `optimizer.rates=(("loss/fastclip_v3/t$", 2e-4),)`.

  Args:
    tau_init: as in `fastclip_v0`.
    rho: how far from uniform the weights of the negatives may be; 6.5 for CC3M, 8.5 for CC12M, 16
      for LAION, tuned with the "released" gradient, which is therefore the default. A number, or a
      schedules.ramp.
    slow_below: at and below this temperature, its updates are divided by 3, as in the release; 0:
      never.
    tau_gradient: as in `fastclip_v0`.
    gamma: as in `fastclip_v0`.
    gamma_schedule: as in `fastclip_v0`.
    gamma_over: as in `fastclip_v0`.
    eps: as in `fastclip_v0`.
    texts: as in `fastclip_v0`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, ids = jnp.eye(4), jnp.asarray([[0, 0], [0, 1], [0, 2], [0, 3]], jnp.uint32)
    >>> batch, sizes = {"image_id": ids, "text_id": ids}, {"image": 4, "text": 4}
    >>> metrics = apply_once(fastclip_v3(tau_init=0.5), {"zimg": z, "ztxt": z}, batch, sizes)
    >>> round(float(metrics["objective"]), 3)  # tau / 2 * 2 * (-1 / tau + rho)
    2.25
  """
  checks.known("config.loss.fastclip_v3.tau_gradient", tau_gradient, GRADIENTS)

  def gradient(tau, sums):
    rho = sums["rho"]
    if tau_gradient == "released":
      return -tau / 2 * (sums["log_u"] + 2 * rho - 2 * sums["h"])
    return -tau / 2 * (sums["log_den"] + 2 * rho - sums["h"])

  checks.between("config.loss.fastclip_v3", *TAU_BOUNDS, tau_init=tau_init)
  checks.between("config.loss.fastclip_v3", 0, slow_below=slow_below)
  averaged = _schedule("fastclip_v3", gamma_schedule, gamma, gamma_over, eps, texts)
  robust = schedules.ramp(rho, "config.loss.fastclip_v3.rho")
  return _one_temperature(tau_init, gradient, averaged, eps, texts, robust, slow_below)


def fastclip_v2(
  *,
  tau_init: float = 0.03,
  tau_min: float = 0.01,
  tau_max: float = 1.0,
  rho: float | Mapping[str, Any] = 7.0,
  lr_tau: float | Mapping[str, Any] = 0.0133,
  b1: float = 0.9,
  b2: float = 0.98,
  eps_tau: float = 1e-6,
  grad_clip: float = 5.0,
  weighting: str = "released",
  gamma: float = 0.2,
  gamma_schedule: str = "cosine",
  gamma_over: int | str = "50%",
  eps: float = 1e-14,
  texts: str = "one",
) -> Loss:
  """Global contrast with a temperature per sample: FastCLIP v2, https://arxiv.org/abs/2407.01445.

  An Adam per sample learns its temperature; the state is five floats per image and per text. "loss"
  is that of `fastclip_v0`; "objective" is half the mean of tau_i (log(u_i + eps) + rho) over images
  plus that over texts, our extension of v3's objective.

  Args:
    tau_init: first temperature of every sample.
    tau_min: lower bound of the temperatures.
    tau_max: upper bound of the temperatures.
    rho: how far from uniform the weights of the negatives may be; a number, or a schedules.ramp.
    lr_tau: learning rate of the temperatures; a number, or a schedules.ramp. As in the release,
      Adam's bias correction counts epochs, and its moments start in the second epoch: the steps of
      the first epoch are lr_tau times the sign of the gradient.
    b1: Adam's decay of the first moment.
    b2: Adam's decay of the second moment.
    eps_tau: Adam's eps.
    grad_clip: bound of a temperature's gradient, before Adam.
    weighting: "released" divides each anchor's term by 2 tau_i, "rgcl" by 2, which is the gradient
      of the robust objective. The published results are those of "released", the default.
    gamma: as in `fastclip_v0`.
    gamma_schedule: as in `fastclip_v0`.
    gamma_over: as in `fastclip_v0`.
    eps: as in `fastclip_v0`, in units of exp(b), where b is the largest exponent so far.
    texts: as in `fastclip_v0`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, ids = jnp.eye(4), jnp.asarray([[0, 0], [0, 1], [0, 2], [0, 3]], jnp.uint32)
    >>> batch, sizes = {"image_id": ids, "text_id": ids}, {"image": 4, "text": 4}
    >>> metrics = apply_once(fastclip_v2(tau_init=0.5), {"zimg": z, "ztxt": z}, batch, sizes)
    >>> round(float(metrics["objective"]), 3)  # 1 / 2 * 2 tau * (-1 / tau + rho)
    2.5
  """
  checks.known("config.loss.fastclip_v2.weighting", weighting, WEIGHTINGS)
  where = "config.loss.fastclip_v2"
  checks.above_zero(where, tau_init=tau_init, tau_min=tau_min, tau_max=tau_max)
  checks.above_zero(where, eps_tau=eps_tau, grad_clip=grad_clip)
  checks.below_one(where, b1=b1, b2=b2)
  global_contrastive.check_bounds(where, tau_init, tau_min, tau_max)
  averaged = _schedule("fastclip_v2", gamma_schedule, gamma, gamma_over, eps, texts)
  robust = schedules.ramp(rho, "config.loss.fastclip_v2.rho")
  rate = schedules.ramp(lr_tau, "config.loss.fastclip_v2.lr_tau")

  def init(sizes):
    fills = dict(log_u=-math.inf, b=0.0, tau=tau_init, m=0.0, v=0.0)
    return {}, global_contrastive.make_tables(global_contrastive.sizes_of(sizes, texts), **fills)

  def moved(context, old, log_den, pull):
    """The next moments and temperature of each anchor [B]."""
    q = jnp.clip(log_den + robust(context) - pull / old["tau"], -grad_clip, grad_clip)
    epoch = jnp.floor(context.epochs).astype(q.dtype) + 1
    beta1, beta2 = (jnp.where(epoch > 1, b, 0.0).astype(q.dtype) for b in (b1, b2))
    m, v = beta1 * old["m"] + (1 - beta1) * q, beta2 * old["v"] + (1 - beta2) * q**2
    mhat, vhat = m / (1 - beta1**epoch), v / (1 - beta2**epoch)
    tau = old["tau"] - rate(context) * mhat / (jnp.sqrt(vhat) + eps_tau)
    return {"m": m, "v": v, "tau": jnp.clip(tau, tau_min, tau_max)}

  def updated(weight, old, log_g, top):
    fresh = _must_restart(old["log_u"] - old["b"])
    b = jnp.maximum(old["b"], top)
    return {"log_u": global_contrastive.average(old["log_u"], log_g, weight, fresh), "b": b}

  def apply(params, state, feats, batch, context):
    zimg = feats["zimg"]
    ztxt, batch = global_contrastive.anchors(feats, batch, texts)
    weight = averaged(context)
    old = global_contrastive.read_tables(state, batch)
    taus = global_contrastive.each(lambda x: x["tau"], old)
    log_g, top = global_contrastive.means(zimg, ztxt, taus, engine=context.engine)
    now = global_contrastive.each(functools.partial(updated, weight), old, log_g, top)
    log_den = global_contrastive.each(
      lambda x: global_contrastive.with_eps(x["log_u"], eps, x["b"]), now
    )
    pulls = global_contrastive.weighted(zimg, ztxt, taus, log_den, log_g, engine=context.engine)
    steps = global_contrastive.each(
      functools.partial(moved, context), old, log_den, jax.lax.stop_gradient(pulls)
    )
    state, _ = global_contrastive.write_tables(
      state, batch, global_contrastive.each(lambda a, b: a | b, now, steps)
    )
    divisors = taus if weighting == "released" else global_contrastive.each(jnp.ones_like, taus)
    surrogate = global_contrastive.both(
      global_contrastive.each(lambda pull, by: pull / (2 * by), pulls, divisors)
    )
    loss = global_contrastive.both(global_contrastive.mass(log_g, log_den))
    objective = (
      global_contrastive.both(
        global_contrastive.each(lambda t, d: t * (d + robust(context)), taus, log_den)
      )
      / 2
    )
    logs = {f"tau_{side}": x.mean() for side, x in taus.items()}
    logs |= {"loss": loss, "objective": objective, "gamma": weight}
    logs["finite_state"] = global_contrastive.is_finite(now, steps)
    return global_contrastive.with_slope(loss, surrogate), (state, logs)

  return Loss(global_contrastive.needs(texts), init, apply, per_sample_state=True)


def _one_temperature(
  tau_init: float,
  gradient: Any,
  averaged: Any,
  eps: float,
  texts: str,
  robust: Any = None,
  slow_below: float = 0.0,
) -> Loss:
  """FastCLIP v0, v1 and v3.

  Args:
    tau_init: first temperature.
    gradient: (tau, sums) -> the gradient of "t"; None: tau is constant. sums: "h", "log_u",
      "log_den" and, for v3, "rho": means over images plus means over texts.
    averaged: (context) -> the weight of the new value in the moving average.
    eps: added to u.
    texts: as in `fastclip_v0`.
    robust: (context) -> rho, for v3.
    slow_below: at and below this temperature, its updates are divided by 3.
  """

  def init(sizes):
    params = {} if gradient is None else {"t": jnp.asarray(-math.log(tau_init), jnp.float32)}
    sizes = global_contrastive.sizes_of(sizes, texts)
    return params, global_contrastive.make_tables(sizes, log_u=-math.inf)

  def apply(params, state, feats, batch, context):
    zimg = feats["zimg"]
    ztxt, batch = global_contrastive.anchors(feats, batch, texts)
    tau = jnp.exp(-jax.lax.stop_gradient(params["t"])) if params else jnp.asarray(tau_init, float)
    weight = averaged(context)
    old = global_contrastive.each(
      lambda x: x["log_u"], global_contrastive.read_tables(state, batch)
    )
    taus = global_contrastive.each(lambda x: jnp.full_like(x, tau), old)
    log_g, _ = global_contrastive.means(zimg, ztxt, taus, engine=context.engine)
    log_u = global_contrastive.each(
      lambda u, g: global_contrastive.average(u, g, weight, _must_restart(u)), old, log_g
    )
    state, _ = global_contrastive.write_tables(
      state, batch, global_contrastive.each(lambda u: {"log_u": u}, log_u)
    )
    log_den = global_contrastive.each(lambda u: global_contrastive.with_eps(u, eps), log_u)
    pull = global_contrastive.weighted_both(zimg, ztxt, taus, log_den, log_g, engine=context.engine)
    sums = {
      "h": jax.lax.stop_gradient(pull) / tau,
      "log_u": global_contrastive.both(log_u),
      "log_den": global_contrastive.both(log_den),
    }
    loss = global_contrastive.both(global_contrastive.mass(log_g, log_den))
    objective = sums["log_den"] / 2
    surrogate = pull / (2 * tau) if robust is None else pull / 2
    if robust is not None:
      rho = sums["rho"] = robust(context)
      loss, objective = tau * (loss + rho + sums["log_u"] / 2), tau * (objective + rho)
    if gradient is not None:
      surrogate += gradient(tau, sums) * params["t"]
    logs = {"loss": loss, "objective": objective, "gamma": weight, "logit_scale": 1 / tau}
    logs["finite_state"] = global_contrastive.is_finite(log_u)
    return global_contrastive.with_slope(loss, surrogate), (state, logs)

  def constrain(params, before):
    if not params:
      return params
    step = params["t"] - before["t"]
    # tau = exp(-t) is small where t is large.
    step = jnp.where(before["t"] >= -math.log(slow_below), step / 3, step) if slow_below else step
    return {"t": jnp.clip(before["t"] + step, 0.0, math.log(100))}

  return Loss(global_contrastive.needs(texts), init, apply, constrain, per_sample_state=True)


def _schedule(name: str, schedule: str, end: float, over: int | str, eps: float, texts: str) -> Any:
  """(context) -> the weight of the new value in the moving average; checks eps and texts, too."""
  where = f"config.loss.{name}"
  global_contrastive.check_texts(name, texts)
  checks.between(where, 0, eps=eps)
  checks.above_zero(where, most=1.0, gamma=end)
  checks.known(f"{where}.gamma_schedule", schedule, ("cosine", "constant"))
  length = schedules.duration(over, f"{where}.gamma_over")
  return lambda context: schedules.gamma(schedule, end, length, context)


def _must_restart(log_u: jax.Array) -> jax.Array:
  """[B] bool: u is new, too small to represent, or not finite, and must restart from g."""
  return ~((log_u >= LOG_TINY) & (log_u < jnp.inf))
