"""FastCLIP: global contrastive losses with a scheduled moving average and learned temperatures."""

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
from bigalign.losses.per_sample import global_contrastive as gcl

LOG_TINY = math.log(1e-35)  # below it, the released code takes u for lost and starts again
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
) -> Loss:
  """Global contrastive loss with one learned temperature: https://arxiv.org/abs/2407.01445.

  "loss" is what the released code prints, the mean of g / (u + eps) of both sides, close to 2
  whatever happens; "objective" the mean of log(u + eps) of both sides, halved.

  Args:
    tau_init: first temperature; the learned parameter "t" is the log of its inverse, kept in
      [0, ln 100].
    tau_gradient: "released" counts the temperature's term twice as much as the features';
      "consistent" is the derivative of what the features minimise.
    gamma: weight of the new value in the moving average of u at the end: 0.2 for a few million
      pairs, 0.8 for LAION-400M.
    gamma_schedule, gamma_over: "cosine", from 1 in this duration, or "constant"; both are 1 in the
      first epoch, see schedules.gamma. About half of the epochs in the paper.
    eps: added to u; 1e-6 at LAION's scale. It is no guard against rounding: anchors with a u far
      below it have no weight.
  """
  checks.known("config.loss.fastclip_v0.tau_gradient", tau_gradient, GRADIENTS)

  def gradient(tau, found):
    return found["h"] if tau_gradient == "released" else found["h"] / 2

  checks.above_zero("config.loss.fastclip_v0", tau_init=tau_init)
  averaged = _schedule("fastclip_v0", gamma_schedule, gamma, gamma_over)
  return _one_temperature(tau_init, gradient, averaged, eps)


def fastclip_v1(
  *,
  tau: float = 0.07,
  gamma: float = 0.2,
  gamma_schedule: str = "cosine",
  gamma_over: int | str = "50%",
  eps: float = 1e-14,
) -> Loss:
  """`fastclip_v0` with a constant temperature `tau`; the gradient is SogCLR's / (2 tau)."""
  checks.above_zero("config.loss.fastclip_v1", tau=tau)
  averaged = _schedule("fastclip_v1", gamma_schedule, gamma, gamma_over)
  return _one_temperature(tau, None, averaged, eps)


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
) -> Loss:
  """Robust global contrastive loss, one learned temperature: https://arxiv.org/abs/2407.01445.

  "loss" is what the released code prints; "objective" is tau / 2 times the mean of
  log(u + eps) + rho of both sides. The release gives the temperature a constant learning rate of
  its own, 2e-4 to 5e-5: `optimizer.rates=(("loss/fastclip_v3/t$", 2e-4),)`.

  Args:
    slow_below: from this temperature down it moves a third as far, as the release does; 0: never.
    rho: 6.5 for CC3M, 8.5 for CC12M, 16 for LAION; found with the "released" gradient, which is
      the default for that reason. A number, or a schedules.ramp.
    others: as in `fastclip_v0`.
  """
  checks.known("config.loss.fastclip_v3.tau_gradient", tau_gradient, GRADIENTS)

  def gradient(tau, found):
    rho = found["rho"]
    if tau_gradient == "released":
      return -tau / 2 * (found["log_u"] + 2 * rho - 2 * found["h"])
    return -tau / 2 * (found["log_den"] + 2 * rho - found["h"])

  checks.above_zero("config.loss.fastclip_v3", tau_init=tau_init)
  averaged = _schedule("fastclip_v3", gamma_schedule, gamma, gamma_over)
  robust = schedules.ramp(rho, "config.loss.fastclip_v3.rho")
  return _one_temperature(tau_init, gradient, averaged, eps, robust, slow_below)


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
) -> Loss:
  """FastCLIP with a temperature per sample, by an Adam per sample: https://arxiv.org/abs/2407.01445.

  "loss" as in `fastclip_v0`; "objective" is half the mean of tau_i (log(u_i + eps) + rho) of both
  sides, our extension of v3's. Five floats are remembered per image and per text.

  Args:
    tau_init, tau_min, tau_max: first temperature of every sample and its bounds.
    rho: how far from uniform the weights of the negatives may be; a number, or a schedules.ramp.
    lr_tau, b1, b2, eps_tau: of the temperatures' Adam; lr_tau may be a ramp too. As released, its
      bias correction counts epochs, and the first epoch has no memory: steps of lr_tau by sign.
    grad_clip: bound of a temperature's gradient before Adam.
    weighting: "released" divides each anchor's term by 2 tau_i; "rgcl" by 2, which is the gradient
      of the robust objective. Published numbers are of the former, the default.
    others: as in `fastclip_v0`, with eps in units of exp(b), the largest exponent met.
  """
  checks.known("config.loss.fastclip_v2.weighting", weighting, WEIGHTINGS)
  checks.above_zero("config.loss.fastclip_v2", tau_init=tau_init, tau_min=tau_min, tau_max=tau_max)
  averaged = _schedule("fastclip_v2", gamma_schedule, gamma, gamma_over)
  robust = schedules.ramp(rho, "config.loss.fastclip_v2.rho")
  rate = schedules.ramp(lr_tau, "config.loss.fastclip_v2.lr_tau")

  def init(sizes):
    fills = dict(log_u=-math.inf, b=0.0, tau=tau_init, m=0.0, v=0.0)
    return {}, gcl.remember(sizes, **fills)

  def moved(context, old, log_den, pull):
    """The next moments and temperature of each anchor."""
    q = jnp.clip(log_den + robust(context) - pull / old["tau"], -grad_clip, grad_clip)
    visits = jnp.floor(context.epochs).astype(q.dtype) + 1
    beta1, beta2 = (jnp.where(visits > 1, b, 0.0).astype(q.dtype) for b in (b1, b2))
    m, v = beta1 * old["m"] + (1 - beta1) * q, beta2 * old["v"] + (1 - beta2) * q**2
    mhat, vhat = m / (1 - beta1**visits), v / (1 - beta2**visits)
    tau = old["tau"] - rate(context) * mhat / (jnp.sqrt(vhat) + eps_tau)
    return {"m": m, "v": v, "tau": jnp.clip(tau, tau_min, tau_max)}

  def visited(weight, old, log_g, top):
    fresh = _lost(old["log_u"] - old["b"])
    b = jnp.maximum(old["b"], top)
    return {"log_u": gcl.average(old["log_u"], log_g, weight, fresh), "b": b}

  def apply(params, state, feats, batch, context):
    zimg, ztxt = feats["zimg"], feats["ztxt"]
    weight = averaged(context)
    old = gcl.recall(state, batch)
    taus = gcl.each(lambda x: x["tau"], old)
    log_g, top = gcl.means(zimg, ztxt, taus, engine=context.engine)
    now = gcl.each(functools.partial(visited, weight), old, log_g, top)
    log_den = gcl.each(lambda x: gcl.with_eps(x["log_u"], eps, x["b"]), now)
    pulls = gcl.weighted(zimg, ztxt, taus, log_den, log_g, engine=context.engine)
    steps = gcl.each(functools.partial(moved, context), old, log_den, jax.lax.stop_gradient(pulls))
    state, _ = gcl.update(state, batch, gcl.each(lambda a, b: a | b, now, steps))
    divisors = taus if weighting == "released" else gcl.each(jnp.ones_like, taus)
    surrogate = gcl.both(gcl.each(lambda pull, by: pull / (2 * by), pulls, divisors))
    loss = gcl.both(gcl.mass(log_g, log_den))
    objective = gcl.both(gcl.each(lambda t, d: t * (d + robust(context)), taus, log_den)) / 2
    logs = {f"tau_{side}": x.mean() for side, x in taus.items()}
    logs |= {"loss": loss, "objective": objective, "gamma": weight}
    logs["finite_state"] = gcl.sound(now, steps)
    return gcl.with_slope(loss, surrogate), (state, logs)

  return Loss(frozenset({"ids"}), init, apply)


def _one_temperature(
  tau_init: float,
  gradient: Any,
  averaged: Any,
  eps: float,
  robust: Any = None,
  slow_below: float = 0.0,
) -> Loss:
  """v0, v1 and v3. gradient: (tau, sums over both sides of means) -> d / dt, None: tau is constant.
  robust: (context) -> rho (v3). slow_below: where tau moves a third as far."""

  def init(sizes):
    params = {} if gradient is None else {"t": jnp.asarray(-math.log(tau_init), jnp.float32)}
    return params, gcl.remember(sizes, log_u=-math.inf)

  def apply(params, state, feats, batch, context):
    zimg, ztxt = feats["zimg"], feats["ztxt"]
    tau = jnp.exp(-jax.lax.stop_gradient(params["t"])) if params else jnp.asarray(tau_init, float)
    weight = averaged(context)
    old = gcl.each(lambda x: x["log_u"], gcl.recall(state, batch))
    taus = gcl.each(lambda x: jnp.full_like(x, tau), old)
    log_g, _ = gcl.means(zimg, ztxt, taus, engine=context.engine)
    log_u = gcl.each(lambda u, g: gcl.average(u, g, weight, _lost(u)), old, log_g)
    state, _ = gcl.update(state, batch, gcl.each(lambda u: {"log_u": u}, log_u))
    log_den = gcl.each(lambda u: gcl.with_eps(u, eps), log_u)
    pull = gcl.weighted_both(zimg, ztxt, taus, log_den, log_g, engine=context.engine)
    found = {
      "h": jax.lax.stop_gradient(pull) / tau,
      "log_u": gcl.both(log_u),
      "log_den": gcl.both(log_den),
    }
    loss = gcl.both(gcl.mass(log_g, log_den))
    objective = found["log_den"] / 2
    surrogate = pull / (2 * tau) if robust is None else pull / 2
    if robust is not None:
      rho = found["rho"] = robust(context)
      loss, objective = tau * (loss + rho + found["log_u"] / 2), tau * (objective + rho)
    if gradient is not None:
      surrogate += gradient(tau, found) * params["t"]
    logs = {"loss": loss, "objective": objective, "gamma": weight, "logit_scale": 1 / tau}
    logs["finite_state"] = gcl.sound(log_u)
    return gcl.with_slope(loss, surrogate), (state, logs)

  def constrain(params, before):
    if not params:
      return params
    step = params["t"] - before["t"]
    # tau = exp(-t) is small where t is large.
    step = jnp.where(before["t"] >= -math.log(slow_below), step / 3, step) if slow_below else step
    return {"t": jnp.clip(before["t"] + step, 0.0, math.log(100))}

  return Loss(frozenset({"ids"}), init, apply, constrain)


def _schedule(name: str, schedule: str, end: float, over: int | str) -> Any:
  """(context) -> the weight of the new value in the moving average."""
  where = f"config.loss.{name}"
  checks.above_zero(where, most=1.0, gamma=end)
  checks.known(f"{where}.gamma_schedule", schedule, ("cosine", "constant"))
  length = schedules.duration(over, f"{where}.gamma_over")
  return lambda context: schedules.gamma(schedule, end, length, context)


def _lost(log_u: jax.Array) -> jax.Array:
  """Never visited, too small to tell, or not finite: u starts again from g."""
  return ~((log_u >= LOG_TINY) & (log_u < jnp.inf))
